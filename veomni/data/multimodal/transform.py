"""From a record to a model's inputs: first its tokens, then its media, decoded when they are wanted.

A stream knows from the first step which documents fill a row, and takes the second for those alone: media that wait
for a row are references, or files as they are, never pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from veomni.batch.fields import FIELDS, IGNORE_INDEX
from veomni.data.multimodal.audio_clip import AudioClip, load_audio, mono
from veomni.data.multimodal.collate import join_compactly
from veomni.data.multimodal.family import Family, MediaFeatures
from veomni.data.multimodal.feature_cache import FeatureCache
from veomni.data.multimodal.images import load_image, upright_size
from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.pixels import PixelList, as_tensor
from veomni.data.multimodal.placeholders import expand_placeholders
from veomni.data.multimodal.reader import MediaReader
from veomni.data.multimodal.videos import VideoReading, load_video
from veomni.data.sources.media_records import MediaItem, media_conversation
from veomni.data.sources.records import Conversation, Document
from veomni.data.text.chat import render_conversation, tokenize_rendered
from veomni.errors import DataError, MediaError
from veomni.models.omni import DECODERS
from veomni.models.transformers_api.chat import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Sample = dict[str, Tensor]
"""``input_ids``, ``labels`` and further inputs with an entry per token ``[seq]`` (``loss_weights`` if some are neither
0 nor 1), and the features of media."""

CompactSample = dict[str, Tensor | PixelList]
"""The same with 8-bit pixels that are not yet normalized."""


@dataclass(frozen=True)
class PlannedMedia:
    """An image, video or audio clip whose tokens are known.

    Attributes:
        item: Where it is.
        text: Takes the place of its placeholder.
        features: What becomes of it, where that had to be made to know the text.
    """

    item: MediaItem
    text: str
    features: MediaFeatures | None = None


@dataclass(frozen=True)
class PlannedDocument:
    """A conversation whose tokens are known.

    Attributes:
        ids: int32 ``[seq]``.
        weights: float32 ``[seq]``: what the loss of each token weighs.
        where: File and record.
        media: In order.
    """

    ids: Tensor
    weights: Tensor
    where: str
    media: list[PlannedMedia]


@dataclass(frozen=True)
class EncodedDocument:
    """A sample and what it was made of.

    Attributes:
        sample: A model's inputs.
        where: File and record.
        media: Images, videos and audio clips, in order, with what became of them.
    """

    sample: Sample
    where: str
    media: list[tuple[MediaItem, MediaFeatures]]


class MultimodalTransform:
    """Makes samples of conversations with media; what a loader's worker calls.

    Args:
        family: What the model makes of media.
        tokenizer: A fast tokenizer.
        chat_template: Jinja source.
        reader: Gets the bytes of media.
        messages_key: Field of a record that holds the messages.
        cache: Keeps features of media between epochs and runs.
    """

    def __init__(
        self,
        family: Family,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str,
        reader: MediaReader | None = None,
        messages_key: str = "messages",
        cache: FeatureCache | None = None,
    ) -> None:
        self.family, self.tokenizer, self.chat_template = family, tokenizer, chat_template
        self.reader, self.messages_key, self.cache = reader or MediaReader(), messages_key, cache

    def __call__(self, document: Document) -> Sample:
        """Return a sample: labels are unshifted, and ``IGNORE_INDEX`` where nothing is supervised.

        Raises:
            MediaError: an image, video or audio clip cannot be used.
            DataError: the conversation cannot.
        """
        return self.finish(self.plan(document))

    def encode(self, document: Document) -> EncodedDocument:
        """Return a sample together with the media in it.

        Raises:
            MediaError: an image, video or audio clip cannot be used.
            DataError: the conversation cannot.
        """
        planned = self.plan(document)
        features = self._features_of(planned)
        sample = _normalized(self._compact(planned, features))
        items = [planned.item for planned in planned.media]
        return EncodedDocument(sample, document.where, list(zip(items, features, strict=True)))

    def plan(self, document: Document) -> PlannedDocument:
        """Return a conversation's tokens; of images, only the headers are read.

        Raises:
            MediaError: an image, video or audio clip cannot be used, as far as was looked.
            DataError: the conversation cannot.
        """
        conversation, items = media_conversation(document, self.messages_key)
        conversation = self._in_form(conversation, document.where)
        rendered = render_conversation(conversation, document.where, self.tokenizer, self.chat_template)
        self._check_kinds(items)
        media = [self._named(item, self._planned) for item in items]
        texts = {
            kind: [planned.text for planned in media if planned.item.kind == kind] for kind in self.family.placeholders
        }
        expanded = expand_placeholders(rendered, self.family.placeholders, texts, document.where)
        [(ids, weights)] = tokenize_rendered([expanded], [document.where], self.tokenizer)
        weighed = torch.tensor(weights, dtype=torch.float32)
        return PlannedDocument(torch.tensor(ids, dtype=torch.int32), weighed, document.where, media)

    def finish_compactly(self, planned: PlannedDocument) -> CompactSample:
        """Return a sample, its pixels still to be normalized.

        Raises:
            MediaError: an image, video or audio clip cannot be used, or is another one than when it was planned.
        """
        return self._compact(planned, self._features_of(planned))

    def finish(self, planned: PlannedDocument) -> Sample:
        """Return a sample.

        Raises:
            MediaError: an image, video or audio clip cannot be used, or is another one than when it was planned.
        """
        return _normalized(self.finish_compactly(planned))

    def _compact(self, planned: PlannedDocument, features: Sequence[MediaFeatures]) -> CompactSample:
        ids = planned.ids.long()
        stand_ins = torch.isin(ids, torch.tensor(sorted(self.family.unsupervised)))
        labels = torch.where((planned.weights > 0) & ~stand_ins, ids, IGNORE_INDEX)
        values: dict[str, list[Tensor | PixelList]] = {}
        places: dict[str, Tensor] = {}
        for media, made in zip(planned.media, features, strict=True):
            for key, value in made.tensors.items():
                values.setdefault(key, []).append(value)
                if FIELDS.get(key).per == "token":
                    places[key] = ids == self.family.id_of(self.family.placeholders[media.item.kind])
        joined = {key: join_compactly(found, FIELDS.get(key)) for key, found in values.items()}
        joined |= {key: _spread(joined[key], there, FIELDS.get(key).pad) for key, there in places.items()}
        if bool((planned.weights[labels != IGNORE_INDEX] != 1).any()):
            joined["loss_weights"] = planned.weights
        return {"input_ids": ids, "labels": labels, **self.family.per_token(ids), **joined}

    # ---------------------------------------------------------------- media

    def _check_kinds(self, items: Sequence[MediaItem]) -> None:
        for item in items:
            if item.kind not in self.family.placeholders:
                kind = self.family.parts.config.model_type
                raise MediaError(f"{item.where}: {kind} models take no {item.kind}", "remove the record")

    def _planned(self, item: MediaItem) -> PlannedMedia:
        """Return what is known of an item without decoding it; with its features where that is too little."""
        reference = item.reference
        if item.kind == "image":
            if hasattr(reference, "getexif"):  # opened already, by `datasets`
                name, content = "an opened image", reference
            else:
                name, content = self.reader(reference)
                if self.reader.is_remote(reference):
                    item = replace(item, reference={"bytes": content, "path": name})
            text = self.family.image_text(*upright_size(content, name, self.reader.limits))
            if text is not None:
                return PlannedMedia(item, text)
        generated = item.kind in DECODERS
        features = self.family.generated(item.kind, item.reference) if generated else self._decoded(item)
        return PlannedMedia(item, features.text, features)

    def _features_of(self, planned: PlannedDocument) -> list[MediaFeatures]:
        return [media.features or self._named(media.item, self._as_planned, media.text) for media in planned.media]

    def _named(self, item: MediaItem, make: Callable[..., T], *given: Any) -> T:
        """Return what is made of an item; errors name it."""
        try:
            return make(item, *given)
        except MediaError as error:
            raise MediaError(f"{item.where}: {error.problem}", error.fix, error.field) from error
        except ValueError as error:  # transformers' processors reject what they cannot resize
            raise MediaError(f"{item.where}: the {item.kind} is rejected: {error}", "remove the record") from error

    def _as_planned(self, item: MediaItem, text: str) -> MediaFeatures:
        features = self._decoded(item)
        if features.text != text:
            problem = "it is not as large as it was, or as its header says"
            raise MediaError(problem, "leave data as it is while it is read")
        return features

    def _decoded(self, item: MediaItem) -> MediaFeatures:
        reference = item.reference
        if item.kind == "image" and hasattr(reference, "getexif"):  # opened already, by `datasets`
            return self._image(reference, "an opened image")
        if item.kind == "audio" and isinstance(reference, Mapping) and reference.get("array") is not None:
            return self._audio(_decoded_clip(reference, self.family.sampling_rate, self.reader.limits))
        name, content = self.reader(reference)
        if self.cache is None:
            return self._from_bytes(item.kind, content, name)
        path = self.cache.path(item.kind, content)
        features = self.cache.read(path)
        if features is None:
            features = self._from_bytes(item.kind, content, name)
            self.cache.write(path, features)
        return features

    def _from_bytes(self, kind: str, content: bytes, name: str) -> MediaFeatures:
        if kind == "image":
            return self._image(content, name)
        if kind == "audio":
            return self._audio(load_audio(content, name, self.family.sampling_rate, self.reader.limits))
        family = self.family
        rate = family.sampling_rate if family.parts.use_audio_in_video else None
        reading = VideoReading(family.sample_frames, family.frame_size, rate, family.parts.video_decoder)
        video = load_video(content, name, reading, self.reader.limits)
        audio = "" if video.audio is None else f", with {len(video.audio.samples) / video.audio.rate:.2f} s of audio"
        seen = f"{len(video.indices)} of {video.total} frames at {video.fps:g} per second"
        return replace(family.video(video), source=f"{seen}, to {_sides(video.frames.shape[-1:-3:-1])}{audio}")

    def _image(self, content: Any, name: str) -> MediaFeatures:
        image = load_image(content, name, self.reader.limits)
        return replace(self.family.image(image), source=f"{_sides(image.size)} pixels")

    def _audio(self, clip: AudioClip) -> MediaFeatures:
        return replace(self.family.audio(clip), source=f"{len(clip.samples) / clip.rate:.2f} s of audio")

    # ---------------------------------------------------------------- forms of content

    def _in_form(self, conversation: Conversation, where: str) -> Conversation:
        """Return a conversation whose contents are what the template reads: text, or lists of parts."""
        messages = [
            self._message(message, f"{where}, message {n}") for n, message in enumerate(conversation.messages, 1)
        ]
        return Conversation(messages, conversation.tools)

    def _message(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        content = message.get("content")
        text, parts = self._forms
        if isinstance(content, str) and parts and not text:
            content = [{"type": "text", "text": content}]
        if isinstance(content, list) and not parts:
            if any(part["type"] != "text" for part in content):
                problem = f"{where}: media, and the chat template has no place for them"
                raise DataError(
                    problem, "use the model's chat_template, or one made for media", "Encoder.chat_template"
                )
            content = "".join(part["text"] for part in content)
        return message if content is None else {**message, "content": content}

    @cached_property
    def _forms(self) -> tuple[bool, bool]:
        """Whether the template shows a content that is text, and one that is a list of parts."""
        probe = "veomniprobe"
        return self._shows(probe, probe), self._shows([{"type": "text", "text": probe}], probe)

    def _shows(self, content: Any, probe: str) -> bool:
        from jinja2 import TemplateError

        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        try:
            text, _ = render_chat(self.tokenizer, turns, self.chat_template)
        except (TemplateError, TypeError):
            return False
        return text.count(probe) == 2 and "'type'" not in text


def _spread(values: Any, there: Tensor, fill: float) -> Tensor:
    """Return ``[seq, ...]`` with an entry of ``values`` at each place that is true, and ``fill`` elsewhere."""
    spread: Tensor = values.new_full((len(there), *values.shape[1:]), fill)
    spread[there] = values
    return spread


def _normalized(sample: CompactSample) -> Sample:
    return {key: as_tensor(value) for key, value in sample.items()}


def _sides(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _decoded_clip(reference: Mapping[str, Any], rate: int, limits: MediaLimits) -> AudioClip:
    """Return an audio clip that `datasets` has decoded."""
    samples, given_rate = np.atleast_2d(np.asarray(reference["array"], np.float32)), int(reference["sampling_rate"])
    limits.check_duration("a decoded audio clip", samples.shape[-1] / given_rate)
    return mono(samples, "a decoded audio clip", given_rate, rate)
