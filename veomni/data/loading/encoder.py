"""How documents become tokens: the tokenizer, its chat template, and a model family's processor of media."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from veomni.batch.split import SequenceShard
from veomni.data.options import Packing
from veomni.data.sources.cache import digest, tokenizer_digest
from veomni.data.sources.schema import RecordSchema
from veomni.data.text.chat_templates import find_chat_template
from veomni.data.text.samples import SampleMaker, TextSamples
from veomni.data.text.tokens import padding_token
from veomni.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from veomni.data.multimodal import MultimodalTransform, SkipBadMedia


@dataclass(frozen=True)
class Encoder:
    """What turns documents into tokens.

    Attributes:
        tokenizer: With an end-of-sequence token; its padding token, if any, fills rows.
        chat_template: For conversations: a template's name or file; None for the tokenizer's own.
        media: Makes samples of conversations with media; None where there are none.
        skip_bad_media: Leaves out records whose media cannot be used; None makes them errors.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    media: MultimodalTransform | None = None
    skip_bad_media: SkipBadMedia | None = None

    def samples(self, schemas: Sequence[RecordSchema], packing: Packing, shard: SequenceShard) -> SampleMaker:
        """Return what makes samples of the records of sources, and micro-batches of the ``shard`` of each row.

        Media without a processor for them, or documents that cannot be cut as ``packing`` says, are a ConfigError;
        conversations without a chat template a DataError.
        """
        texts = None
        if not all(schema.type.has_media for schema in schemas):
            texts = TextSamples(self.tokenizer, schemas, self._text_template(schemas), packing, shard)
            if not any(schema.type.has_media for schema in schemas):
                return texts
        from veomni.data.multimodal import MediaSamples
        from veomni.data.multimodal.collate import MultimodalCollator

        if self.media is None:
            problem = "conversations with media need a model's processor"
            raise ConfigError(problem, "give Encoder(media=...)", "Encoder.media")
        collator = MultimodalCollator(
            self.media.family.config, max_seq_len=packing.max_seq_len,
            pad_token_id=padding_token(self.tokenizer), shard=shard,
        )  # fmt: skip
        return MediaSamples(self.media, collator, schemas, packing.on_overflow, texts, self.skip_bad_media)

    def digests(self, schemas: Sequence[RecordSchema]) -> dict[str, str]:
        """Return what samples depend on beside the data, by name."""
        found = {"tokenizer": tokenizer_digest(self.tokenizer)}
        found["schemas"] = digest([schema.facts() for schema in schemas])
        if not any(schema.type.has_media for schema in schemas) or self.media is None:
            return found | {"chat template": digest(self._text_template(schemas))}
        from veomni.data.multimodal import settings_of

        return found | {
            "chat template": digest(self.media.chat_template), "media": digest(settings_of(self.media.family)),
        }  # fmt: skip

    def _text_template(self, schemas: Sequence[RecordSchema]) -> str:
        renders = any(schema.type.renders and not schema.type.has_media for schema in schemas)
        return find_chat_template(self.chat_template, self.tokenizer) if renders else ""
