"""Qwen2-Audio, and the audio of Qwen2.5-Omni and Qwen3-Omni."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veomni.data.multimodal.family import Family, FamilyParts, MediaFeatures
from veomni.errors import MediaError

if TYPE_CHECKING:
    from veomni.data.multimodal.audio_clip import AudioClip


class Qwen2Audio(Family):
    """Qwen2-Audio: an audio clip is padded to the tower's 30 seconds."""

    def __init__(self, parts: FamilyParts) -> None:
        super().__init__(parts)
        self.placeholders = {"audio": self.token("audio_token_id")}

    def audio(self, clip: AudioClip) -> MediaFeatures:
        """Return ``input_features`` ``[1, mels, frames]`` and ``feature_attention_mask`` ``[1, frames]``."""
        tensors = mel_features(self.parts.feature_extractor, clip, self.parts.feature_extractor.n_samples)
        tokens = halved_twice(int(tensors["feature_attention_mask"].sum()))
        return MediaFeatures(tensors, self.placeholders["audio"] * at_least_one(tokens, clip))


def mel_features(extractor: Any, clip: AudioClip, samples: int) -> dict[str, Tensor]:
    """Return an audio clip's log-mel spectrogram, as the model's feature extractor defines it.

    Args:
        extractor: One of transformers'.
        clip: At the extractor's rate.
        samples: Length to which it is filled up with silence.

    Raises:
        MediaError: the clip is longer than the extractor takes, which would cut the rest off, or shorter than a frame.
    """
    seconds, longest = len(clip.samples) / clip.rate, extractor.n_samples / extractor.sampling_rate
    if len(clip.samples) > extractor.n_samples:
        raise MediaError(f"{seconds:.1f} seconds of audio, and the model takes {longest:g}", "cut it into pieces")
    at_least_one(len(clip.samples) // extractor.n_fft, clip)
    made: Any = extractor(
        clip.samples, sampling_rate=clip.rate, return_attention_mask=True, padding="max_length", truncation=False,
        max_length=samples, return_tensors="pt",
    )  # fmt: skip
    return {
        "input_features": made["input_features"].to(torch.float32),
        "feature_attention_mask": made["attention_mask"].to(torch.int64),
    }


def halved_twice(frames: int) -> int:
    """Return the features of a tower with a convolution of stride 2 and a mean of pairs."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def at_least_one(tokens: int, clip: AudioClip) -> int:
    """Return ``tokens``, unless there are none.

    Raises:
        MediaError: the audio clip is too short for the model to make a feature of.
    """
    if tokens < 1:
        milliseconds = 1000 * len(clip.samples) / clip.rate
        raise MediaError(
            f"{milliseconds:.1f} ms of audio, too short for a feature", "replace the file, or remove the record"
        )
    return tokens
