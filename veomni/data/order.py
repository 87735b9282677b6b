"""Orders that depend on (seed, epoch) alone: the same on every rank, any number of ranks, and any version of numpy.

Keys are drawn with the splitmix64 finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number generators",
2014) rather than a numpy ``Generator``, whose streams may change between numpy versions (NEP 19): a resumed run's order
must not.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


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
