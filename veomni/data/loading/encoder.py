"""How documents become tokens: the tokenizer, its chat template, and a model family's processor of media."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from veomni.batch.split import SequenceShard
from veomni.data.loading.options import Packing
from veomni.data.sources.cache import digest, tokenizer_digest
from veomni.data.sources.schema import RecordSchema
from veomni.data.text.chat_templates import find_chat_template
from veomni.data.text.samples import SampleMaker, TextSamples
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

    @property
    def pad_token_id(self) -> int:
        """The token that fills rows."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int((pad if pad is not None else end) or 0)

    def samples(self, schemas: Sequence[RecordSchema], packing: Packing, shard: SequenceShard) -> SampleMaker:
        """Return what makes samples of records.

        Args:
            schemas: What the records of each source hold.
            packing: Tokens of a row, and what happens to longer documents.
            shard: The positions of each row that are given out.

        Raises:
            ConfigError: there are media and no processor for them, or documents cannot be cut as ``packing`` says.
            DataError: there is no chat template.
        """
        if not any(schema.type.has_media for schema in schemas):
            return self._text_samples(schemas, packing, shard)
        from veomni.data.multimodal import MediaSamples, settings_of
        from veomni.data.multimodal.collate import MultimodalCollator

        if self.media is None:
            problem = "conversations with media need a model's processor"
            raise ConfigError(problem, "give Encoder(media=...)", "Encoder.media")
        has_texts = any(not schema.type.has_media for schema in schemas)
        family = self.media.family
        return MediaSamples(
            self.media,
            MultimodalCollator(
                family.parts.config, max_seq_len=packing.max_seq_len, pad_token_id=self.pad_token_id, shard=shard
            ),
            skipping=self.skip_bad_media,
            schemas=schemas,
            texts=self._text_samples(schemas, packing, shard) if has_texts else None,
            on_overflow=packing.on_overflow,
            digests=self._digests(self.media.chat_template, schemas) | {"media": digest(settings_of(family))},
        )

    def _text_samples(self, schemas: Sequence[RecordSchema], packing: Packing, shard: SequenceShard) -> TextSamples:
        renders = any(schema.type.renders and not schema.type.has_media for schema in schemas)
        template = find_chat_template(self.chat_template, self.tokenizer) if renders else ""
        return TextSamples(
            self.tokenizer, schemas, template, packing.max_seq_len, packing.on_overflow, shard,
            self._digests(template, schemas),
        )  # fmt: skip

    def _digests(self, template: str, schemas: Sequence[RecordSchema]) -> dict[str, str]:
        return {
            "tokenizer": tokenizer_digest(self.tokenizer),
            "chat template": digest(template),
            "schemas": digest([schema.facts() for schema in schemas]),
        }
