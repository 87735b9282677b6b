"""From a record to a model's inputs: first its tokens, by which a stream fills rows, then its media when they leave.

So media that wait for a row are references, or files as they are, never pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veomni.batch.fields import FIELDS, IGNORE_INDEX
from veomni.data.multimodal.collate import join_items
from veomni.data.multimodal.family import Family
from veomni.data.multimodal.feature_cache import FeatureCache
from veomni.data.multimodal.media_decoder import MediaDecoder, PlannedMedia
from veomni.data.multimodal.pixels import PixelList, as_tensor
from veomni.data.multimodal.reader import MediaReader
from veomni.data.sources.formats import MESSAGES
from veomni.data.sources.media_records import media_conversation
from veomni.data.sources.records import Document
from veomni.data.text.chat import Rendered, render_conversation, tokenize_rendered
from veomni.data.text.tokens import Tokens
from veomni.errors import DataError
from veomni.models.transformers_api.chat import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sample = dict[str, Tensor]
"""``input_ids``, ``labels`` and further inputs with an entry per token ``[seq]`` (``loss_weights`` if some are neither
0 nor 1), and the features of media."""

CompactSample = dict[str, Tensor | PixelList]
"""The same with 8-bit pixels that are not yet normalized."""


@dataclass(frozen=True)
class PlannedDocument:
    """A conversation whose tokens are known; those that stand for features of its media, in order, weigh 0."""

    tokens: Tokens
    where: str
    media: list[PlannedMedia]


class MultimodalTransform:
    """Makes samples of conversations with media; what a loader's worker calls.

    The tokenizer is a fast one, the chat template Jinja source; ``messages_key`` is the field that holds the messages,
    and ``cache`` keeps the features of media between epochs and runs.
    """

    def __init__(
        self, family: Family, tokenizer: PreTrainedTokenizerBase, chat_template: str,
        reader: MediaReader | None = None, messages_key: str = MESSAGES, cache: FeatureCache | None = None,
    ) -> None:  # fmt: skip
        self.family, self.tokenizer, self.chat_template = family, tokenizer, chat_template
        self.media, self.messages_key = MediaDecoder(family, reader or MediaReader(), cache), messages_key

    def __call__(self, document: Document) -> Sample:
        """Return a sample with unshifted labels; MediaError for unusable media, DataError for the conversation."""
        decoded = self.decode(self.plan(document))
        return {key: as_tensor(value) for key, value in self.sample(decoded.tokens, decoded.media).items()}

    def plan(self, document: Document) -> PlannedDocument:
        """Return a conversation's tokens; of images, only the headers are read. Raises as a call does."""
        conversation, items = media_conversation(document, self.messages_key)
        numbered = enumerate(conversation.messages, 1)
        messages = [self._message(message, f"{document.where}, message {number}") for number, message in numbered]
        conversation = replace(conversation, messages=messages)
        rendered = render_conversation(conversation, document.where, self.tokenizer, self.chat_template)
        media = [self.media.plan(item) for item in items]
        texts = {kind: [one.text for one in media if one.item.kind == kind] for kind in self.family.placeholders}
        expanded = expand_placeholders(rendered, self.family.placeholders, texts, document.where)
        [(ids, weights)] = tokenize_rendered([expanded], [document.where], self.tokenizer)
        supervised = ~np.isin(ids, sorted(self.family.unsupervised))
        return PlannedDocument(Tokens.of(ids, np.where(supervised, weights, 0.0)), document.where, media)

    def decode(self, planned: PlannedDocument) -> PlannedDocument:
        """Return a conversation with the features of its media (MediaError: see :meth:`MediaDecoder.decode`)."""
        return replace(planned, media=[self.media.decode(one) for one in planned.media])

    def sample(self, tokens: Tokens, decoded: Sequence[PlannedMedia] = ()) -> CompactSample:
        """Return a sample of a text, or of a conversation with decoded media; pixels are still to be normalized."""
        ids = torch.from_numpy(tokens.ids.astype(np.int64))
        labels = torch.where(torch.from_numpy(tokens.supervised), ids, IGNORE_INDEX)
        sample: CompactSample = {"input_ids": ids, "labels": labels}
        sample |= self.family.per_token(ids)
        values: dict[str, list[Tensor | PixelList]] = {}
        kinds: dict[str, str] = {}
        for media in decoded:
            for key, value in media.features.tensors.items() if media.features else ():
                values.setdefault(key, []).append(value)
                kinds[key] = media.item.kind
        for key, found in values.items():
            rule = FIELDS.get(key)
            joined = join_items(found, rule)
            if rule.per == "token":
                entries = as_tensor(joined)
                joined = entries.new_full((len(ids), *entries.shape[1:]), rule.pad)
                joined[ids == self.family.id_of(self.family.placeholders[kinds[key]])] = entries
            sample[key] = joined
        if tokens.fractional:
            sample["loss_weights"] = torch.from_numpy(tokens.weights)
        return sample

    def _message(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        """Return a message whose content is what the template reads: text, or a list of parts."""
        content = message.get("content")
        text, parts = self._forms
        if isinstance(content, str) and parts and not text:
            content = [{"type": "text", "text": content}]
        if isinstance(content, list) and not parts:
            if any(part["type"] != "text" for part in content):
                problem = f"{where}: media, and the chat template has no place for them"
                raise DataError(problem, "use the model's chat_template, or one for media", "Encoder.chat_template")
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


def expand_placeholders(
    rendered: Rendered, tokens: Mapping[str, str], texts: Mapping[str, Sequence[str]], where: str
) -> Rendered:
    """Put ``texts`` in the place of placeholders, and move what is supervised along.

    There is one per item: of each kind the one in ``tokens`` (DataError: more or fewer than ``texts`` of that kind).
    """
    found = list(re.finditer("|".join(map(re.escape, tokens.values())) or r"(?!)", rendered.text))
    left = {}
    for kind, token in tokens.items():
        _require_equal(kind, token, sum(match.group() == token for match in found), len(texts.get(kind, ())), where)
        left[token] = iter(texts.get(kind, ()))
    pieces, moves, at, moved = [], [(0, 0)], 0, 0
    for match in found:
        text = next(left[match.group()])
        pieces += [rendered.text[at : match.start()], text]
        at = match.end()
        moved += len(text) - len(match.group())
        moves.append((at, moved))
    spans = rendered.supervised
    spans = [span._replace(start=_moved(span.start, moves), stop=_moved(span.stop, moves)) for span in spans]
    return Rendered("".join([*pieces, rendered.text[at:]]), spans)


def _require_equal(kind: str, token: str, places: int, items: int, where: str) -> None:
    counts = f"{places} {kind} placeholders ({token}), the record {items} {kind}s"
    problem = f"{where}: the rendered conversation has {counts}"
    if places > items:
        raise DataError(problem, f"give the missing media, or take {token} out of the text")
    if places < items:
        raise DataError(problem, "the chat template leaves media out: use another one", "Encoder.chat_template")


def _moved(place: int, moves: Sequence[tuple[int, int]]) -> int:
    """Move the end of a span, which lies within no placeholder, by what was inserted before it."""
    return place + [moved for at, moved in moves if at <= place][-1]
