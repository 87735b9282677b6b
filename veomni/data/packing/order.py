"""Orders that depend on (seed, epoch) alone: the same on every rank, any number of ranks, and any version of numpy.

Keys are drawn with the splitmix64 finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number generators",
2014): the streams of a numpy ``Generator`` may change between versions (NEP 19), and a resumed run's order must not.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_WORD = (1 << 64) - 1
_ROUNDS = 6


def shuffled(count: int, purpose: str, *keys: int) -> NDArray[np.int64]:
    """Return a permutation of ``range(count)`` drawn from ``purpose`` and ``keys``."""
    return np.argsort(_hashed(np.arange(count), purpose, *keys), kind="stable")


def hashed_uniform(values: NDArray[np.int64], purpose: str, *keys: int) -> NDArray[np.float64]:
    """Return a number in [0, 1) for every value, depending on that value, ``purpose`` and ``keys`` alone."""
    return (_hashed(values, purpose, *keys) >> np.uint64(11)) / np.float64(1 << 53)


def _hashed(values: NDArray[np.int64], purpose: str, *keys: int) -> NDArray[np.uint64]:
    stream = hashlib.blake2b(repr((purpose, *keys)).encode(), digest_size=8).digest()
    mixed = (values.astype(np.uint64) + np.uint64(1)) * _GAMMA + np.frombuffer(stream, "<u8")
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Permutation:
    """A permutation of ``range(count)`` without a table: any entry is computed on its own, however large ``count`` is.

    It is drawn from ``purpose`` and ``keys``. A balanced Feistel network (Luby and Rackoff, 1988) permutes the smallest
    power of four that is large enough; an entry that falls outside is permuted again until it is inside.
    """

    def __init__(self, count: int, purpose: str, *keys: int) -> None:
        self.count = count
        self._half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        drawn = hashlib.blake2b(repr((purpose, *keys)).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(drawn[at : at + 8], "little") for at in range(0, 8 * _ROUNDS, 8)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        value = self._once(index)
        while value >= self.count:
            value = self._once(value)
        return value

    def _once(self, value: int) -> int:
        left, right = value >> self._half, value & self._mask
        for key in self._keys:
            mixed = ((right + key) * 0xBF58476D1CE4E5B9) & _WORD
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & self._mask)
        return left << self._half | right
