"""Qwen2-Audio, and the log-mel spectrograms of Qwen2.5-Omni, Qwen3-Omni and composed models."""

from typing import Any

import torch
from torch import Tensor

from veomni.data.multimodal.audio_clip import AudioClip
from veomni.data.multimodal.family import Family, MediaFeatures
from veomni.data.multimodal.limits import unusable
from veomni.errors import MediaError


class Qwen2Audio(Family):
    """Qwen2-Audio: an audio clip is padded to the encoder's 30 seconds."""

    def __post_init__(self) -> None:
        self.placeholders = {"audio": self.token("audio_token_id")}

    def audio(self, clip: AudioClip) -> MediaFeatures:
        """Return ``input_features`` ``[1, mels, frames]`` and ``feature_attention_mask`` ``[1, frames]``."""
        tensors = mel_features(self.feature_extractor, clip, self.feature_extractor.n_samples)
        tokens = halved_twice(int(tensors["feature_attention_mask"].sum()))
        return MediaFeatures(tensors, self.placeholders["audio"] * at_least_one(tokens, clip))


def mel_features(extractor: Any, clip: AudioClip, samples: int) -> dict[str, Tensor]:
    """Return the log-mel spectrogram of a clip, filled up with silence to ``samples``, by transformers' ``extractor``.

    MediaError for a clip longer than the extractor takes, which would cut the rest off, or shorter than a frame.
    """
    seconds, longest = len(clip.samples) / clip.rate, extractor.n_samples / extractor.sampling_rate
    if len(clip.samples) > extractor.n_samples:
        raise MediaError(f"{seconds:.1f} seconds of audio, and the model takes {longest:g}", "cut it into pieces")
    at_least_one(len(clip.samples) // extractor.n_fft, clip)
    made: Any = extractor(
        clip.samples, sampling_rate=clip.rate, return_attention_mask=True, padding="max_length", truncation=False,
        max_length=samples, return_tensors="pt",
    )  # fmt: skip
    mask = made["attention_mask"].to(torch.int64)
    return {"input_features": made["input_features"].to(torch.float32), "feature_attention_mask": mask}


def halved_twice(frames: int) -> int:
    """Return the features of an encoder with a convolution of stride 2 and a mean of pairs."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def at_least_one(tokens: int, clip: AudioClip) -> int:
    """Return ``tokens``; raises MediaError if the audio clip is too short for the model to make a feature of."""
    if tokens < 1:
        raise unusable(f"{1000 * len(clip.samples) / clip.rate:.1f} ms of audio, too short for a feature")
    return tokens
