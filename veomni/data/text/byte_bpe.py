"""A byte-level BPE tokenizer trained on the spot: any text round-trips, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from veomni.data.sources.cache import build_once, cache_directory, digest, lacks
from veomni.data.sources.dataset import DocumentStream
from veomni.data.text.chat_templates import CHAT_TEMPLATES
from veomni.errors import ConfigError
from veomni.logging import create_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = create_logger(__name__)

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<|code_pad|>", "<|latent_pad|>",
)  # fmt: skip
"""The first entries of the vocabulary, in order: what the templates chatml, qwen3-vl, qwen3-omni and omni write."""

_BYTES = 256
_TRAINING_CHARACTERS = 16_000_000
_FORMAT = 2


def cached_byte_bpe(dataset: DocumentStream, vocab_size: int, cache_dir: str | Path | None = None) -> Path:
    """Return the directory of the tokenizer of :func:`train_byte_bpe` for a dataset, trained if it is not there yet.

    It is kept in ``cache_dir`` under a digest of the texts; None stands for ``$XDG_CACHE_HOME/veomni``.
    """
    cache = cache_directory(cache_dir)
    directory = cache / "tokenizers" / digest([_FORMAT, dataset.fingerprint(cache), vocab_size])

    def build(empty: Path) -> None:
        train_byte_bpe(dataset.texts(), vocab_size).save_pretrained(empty)

    build_once(directory, build, lacks("tokenizer.json"))
    return directory


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer with the chatml template; it ends documents with ``<|endoftext|>`` and pads with ``<|pad|>``.

    The same texts give the same tokenizer. They are read once; of much text, every second, fourth, ... one is used, so
    that training takes seconds. ``vocab_size`` counts the 256 bytes and the special tokens, and is a ConfigError below
    their number; fewer entries are made when the texts are short.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _BYTES + len(SPECIAL_TOKENS):
        raise ConfigError(f"vocab_size {vocab_size} is too small", f"use at least {_BYTES + len(SPECIAL_TOKENS)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_thinned(texts, _TRAINING_CHARACTERS), trainer)
    end, pad, *others = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=pad,
        additional_special_tokens=others,
        chat_template=CHAT_TEMPLATES.get("chatml"),
        clean_up_tokenization_spaces=False,
    )


def _thinned(texts: Iterable[str], limit: int) -> list[str]:
    """Return every ``2^k``-th text, for the smallest k that keeps at most ``limit`` characters (at least one text)."""
    kept: list[str] = []
    size, stride, seen = 0, 1, 0
    for seen, text in enumerate(texts, start=1):
        if (seen - 1) % stride:
            continue
        kept.append(text)
        size += len(text)
        while size > limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(len, kept))
    if stride > 1:
        logger.info_rank0("the tokenizer is trained on %s of %s texts (%s characters)", len(kept), seen, size)
    return kept
