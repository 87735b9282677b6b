"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: images, videos with or without their audio, and audio clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from veomni.data.multimodal.family import FamilyParts, MediaFeatures
from veomni.data.multimodal.pixels import as_tensor
from veomni.data.multimodal.qwen_audio import at_least_one, halved_twice, mel_features
from veomni.data.multimodal.qwen_vl import Qwen2VL

if TYPE_CHECKING:
    from veomni.data.multimodal.audio_clip import AudioClip
    from veomni.data.multimodal.videos import Video


class Qwen25Omni(Qwen2VL):
    """Qwen2.5-Omni: the tokens of a video and of its audio take turns, two seconds each."""

    positions_per_second = 25.0
    _seconds_per_turn = 2.0

    def __init__(self, parts: FamilyParts) -> None:
        super().__init__(parts)
        self.placeholders["audio"] = self.token("audio_token_id")

    def audio(self, clip: AudioClip) -> MediaFeatures:
        """Return ``input_features`` ``[1, mels, frames]`` and ``feature_attention_mask`` ``[1, frames]``."""
        extractor = self.parts.feature_extractor
        tensors = mel_features(extractor, clip, self.padded_samples(len(clip.samples)))
        frames = int(tensors["feature_attention_mask"].sum())
        tensors = {key: value[..., :frames] for key, value in tensors.items()}
        tokens = self.audio_tokens(frames)
        return MediaFeatures(tensors, self.placeholders["audio"] * at_least_one(tokens, clip))

    def padded_samples(self, samples: int) -> int:
        """Return the length at which frames are computed: silence follows, for the last ones to see."""
        extractor = self.parts.feature_extractor
        return (
            -(-samples // extractor.hop_length) + -(-extractor.n_fft // extractor.hop_length)
        ) * extractor.hop_length

    def audio_tokens(self, frames: int) -> int:
        """Return the number of tokens of an audio clip."""
        return halved_twice(frames)

    def video_times(self, video: Video) -> dict[str, Tensor]:
        """Return ``video_second_per_grid`` ``[1]``: the seconds of a patch."""
        return {"video_second_per_grid": torch.tensor([self._seconds_per_patch(video)])}

    def _seconds_per_patch(self, video: Video) -> float:
        return float(self.parts.video["temporal_patch_size"] / video.sampled_fps)

    def video(self, video: Video) -> MediaFeatures:
        """Return a video's features, and those of its audio track if it has one."""
        features = super().video(video)
        if video.audio is None:
            return features
        audio = self.audio(video.audio)
        tokens = audio.text.count(self.placeholders["audio"])
        grid = as_tensor(features.tensors["video_grid_thw"])
        text = self.interleaved(grid, self._seconds_per_patch(video), tokens)
        ends = self.token("audio_start_token_id"), self.token("audio_end_token_id")
        return replace(features, tensors={**features.tensors, **audio.tensors}, text=text.join(ends))

    def interleaved(self, grid: Tensor, seconds: float, clips: int) -> str:
        """Return the tokens of a video and of its audio, in the order of time."""
        turn = int(self.positions_per_second * self._seconds_per_turn)
        seen = [_turn_sizes(self._positions(grid, seconds), turn), _turn_sizes(range(clips), turn)]
        turns = max(map(len, seen))
        kinds = [self.placeholders["video"], self.placeholders["audio"]]
        return "".join(
            token * sizes[number] for number in range(turns) for token, sizes in zip(kinds, seen, strict=True)
            if number < len(sizes)
        )  # fmt: skip

    def _positions(self, grid: Tensor, seconds: float) -> list[float]:
        per_patch = self.tokens(grid) // int(grid[0, 0])
        return [time * seconds * self.positions_per_second for time in range(int(grid[0, 0])) for _ in range(per_patch)]

    def per_token(self, ids: Tensor) -> dict[str, Tensor]:
        """Return nothing: omni models distinguish media by their placeholders."""
        return {}


class Qwen3Omni(Qwen25Omni):
    """Qwen3-Omni: token by token, a video's comes before its audio's of the same time."""

    positions_per_second = 13.0
    video_defaults: ClassVar[Mapping[str, Any]] = {
        **Qwen2VL.video_defaults, "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
        "patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip

    def padded_samples(self, samples: int) -> int:
        """Return the length at which frames are computed: the audio clip's own."""
        return samples

    def audio_tokens(self, frames: int) -> int:
        """Return the tokens of an audio clip: windows of 100 frames become 13 each, the rest is halved thrice."""
        window = 2 * self.parts.config.audio_config.n_window
        whole, rest = divmod(frames, window)
        for _ in range(3):
            rest = (rest - 1) // 2 + 1
        return whole * 13 + rest

    def interleaved(self, grid: Tensor, seconds: float, clips: int) -> str:
        """Return the tokens of a video and of its audio, in the order of time."""
        video, audio = self.placeholders["video"], self.placeholders["audio"]
        places = [(place, 0, video) for place in self._positions(grid, seconds)]
        places += [(float(place), 1, audio) for place in range(clips)]
        return "".join(token for _, _, token in sorted(places))


def _turn_sizes(places: Sequence[float], turn: int) -> list[int]:
    """Return how many of ascending places lie in each turn; one beyond the next turn begins the next all the same."""
    sizes, current, begun = [], 1, 0
    for index, place in enumerate(places):
        if place >= current * turn:
            sizes.append(index - begun)
            begun, current = index, current + 1
    return [*sizes, len(places) - begun]
