"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: images, videos with or without their audio, and audio clips."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor

from veomni.data.multimodal.audio_clip import AudioClip
from veomni.data.multimodal.family import MediaFeatures
from veomni.data.multimodal.pixels import as_tensor
from veomni.data.multimodal.qwen_audio import at_least_one, halved_twice, mel_features
from veomni.data.multimodal.qwen_vl import Qwen2VL
from veomni.data.multimodal.videos import Video


class Qwen25Omni(Qwen2VL):
    """Qwen2.5-Omni: the tokens of a video and of its audio take turns, two seconds each."""

    positions_per_second = 25.0
    _seconds_per_turn = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.placeholders["audio"] = self.token("audio_token_id")

    def audio(self, clip: AudioClip) -> MediaFeatures:
        """Return ``input_features`` ``[1, mels, frames]`` and ``feature_attention_mask`` ``[1, frames]``."""
        tensors = mel_features(self.feature_extractor, clip, self.padded_samples(len(clip.samples)))
        frames = int(tensors["feature_attention_mask"].sum())
        tensors = {key: value[..., :frames] for key, value in tensors.items()}
        return MediaFeatures(tensors, self.placeholders["audio"] * at_least_one(self.audio_tokens(frames), clip))

    def padded_samples(self, samples: int) -> int:
        """Return the length at which frames are computed: silence follows, for the last ones to see."""
        extractor = self.feature_extractor
        frames = -(-samples // extractor.hop_length) + -(-extractor.n_fft // extractor.hop_length)
        return int(frames * extractor.hop_length)

    def audio_tokens(self, frames: int) -> int:
        """Return the number of tokens of an audio clip."""
        return halved_twice(frames)

    def video_times(self, video: Video) -> dict[str, Tensor]:
        """Return ``video_second_per_grid`` ``[1]``: the seconds of a patch."""
        return {"video_second_per_grid": torch.tensor([self._seconds_per_patch(video)])}

    def _seconds_per_patch(self, video: Video) -> float:
        return float(self.video_settings["temporal_patch_size"] / video.sampled_fps)

    def video(self, video: Video) -> MediaFeatures:
        """Return a video's features, and those of its audio track if it has one."""
        features = super().video(video)
        if video.audio is None:
            return features
        audio = self.audio(video.audio)
        clips = audio.text.count(self.placeholders["audio"])
        grid = as_tensor(features.tensors["video_grid_thw"])
        per_patch, duration = self.tokens(grid) // int(grid[0, 0]), self._seconds_per_patch(video)
        places = [at * duration * self.positions_per_second for at in range(int(grid[0, 0])) for _ in range(per_patch)]
        ends = self.token("audio_start_token_id"), self.token("audio_end_token_id")
        tensors = {**features.tensors, **audio.tensors}
        return replace(features, tensors=tensors, text=self.interleaved(places, clips).join(ends))

    def interleaved(self, places: Sequence[float], clips: int) -> str:
        """Return the tokens of a video, whose places are given, and of its audio at 0, 1, ..., in the order of time."""
        turn = int(self.positions_per_second * self._seconds_per_turn)
        video = [self.placeholders["video"] * size for size in _turn_sizes(places, turn)]
        audio = [self.placeholders["audio"] * size for size in _turn_sizes(range(clips), turn)]
        return "".join(chain.from_iterable(zip_longest(video, audio, fillvalue="")))

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
        whole, rest = divmod(frames, 2 * self.config.audio_config.n_window)
        for _ in range(3):
            rest = (rest - 1) // 2 + 1
        return whole * 13 + rest

    def interleaved(self, places: Sequence[float], clips: int) -> str:
        """Return the tokens of a video, whose places are given, and of its audio at 0, 1, ..., in the order of time."""
        tokens = [(place, 0, self.placeholders["video"]) for place in places]
        tokens += [(float(place), 1, self.placeholders["audio"]) for place in range(clips)]
        return "".join(token for _, _, token in sorted(tokens))


def _turn_sizes(places: Sequence[float], turn: int) -> list[int]:
    """Return how many of ascending places lie in each turn; one beyond the next turn begins the next all the same."""
    sizes, current, begun = [], 1, 0
    for index, place in enumerate(places):
        if place >= current * turn:
            sizes.append(index - begun)
            begun, current = index, current + 1
    return [*sizes, len(places) - begun]
