"""Telephone keys, two sines each (ITU-T Recommendation Q.23), in white noise, as conversations with audio.

As telephones send it: 8,000 samples of 8 bits a second (G.711). Sines are 0 to 20 dB above the noise.
"""

import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from veomni.errors import MissingExtraError

KEYS = ("123", "456", "789", "*0#")
_ROWS, _COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)
_RATE = 8000
_SIZES = {"train": 3000, "test": 300}
_SEEDS = {"train": 1, "test": 2}


def keypad_tones(part: str) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Yield question, answer and audio of ``train`` or ``test``; MissingExtraError without soundfile."""
    random = np.random.default_rng(_SEEDS[part])
    for _ in range(_SIZES[part]):
        key = str(random.choice(list("".join(KEYS))))
        wave = np.concatenate([_pause(random), _tone(key, random), _pause(random)])
        wave += random.standard_normal(len(wave)) * 10 ** (-random.uniform(0, 20) / 20)
        yield "<audio>Which key was pressed?", key, {"audios": _wav(wave)}


def _tone(key: str, random: np.random.Generator) -> NDArray[np.float64]:
    row = next(number for number, keys in enumerate(KEYS) if key in keys)
    times = np.arange(int(_RATE * random.uniform(0.08, 0.14))) / _RATE
    sines = (
        random.uniform(0.7, 1.4) * np.sin(2 * np.pi * frequency * times + random.uniform(0, 2 * np.pi))
        for frequency in (_ROWS[row], _COLUMNS[KEYS[row].index(key)])
    )
    return np.asarray(sum(sines))


def _pause(random: np.random.Generator) -> NDArray[np.float64]:
    return np.zeros(int(_RATE * random.uniform(0.03, 0.4)))


def _wav(samples: NDArray[np.float64]) -> bytes:
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError("soundfile", "audio") from error
    file = io.BytesIO()
    loudest = np.abs(samples).max()
    soundfile.write(file, (0.9 / loudest * samples).astype(np.float32), _RATE, format="WAV", subtype="ULAW")
    return file.getvalue()
