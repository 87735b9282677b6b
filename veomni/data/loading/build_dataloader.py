"""From a dataset to a loader: tokenise, cut, pack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from veomni.batch.split import WHOLE_ROWS, SequenceShard
from veomni.data.loading.blocks import Units
from veomni.data.loading.loader import LoaderSettings, PackedDataLoader
from veomni.data.loading.shard_reader import StreamPlan, StreamSource
from veomni.data.loading.stream_loader import StreamLoader
from veomni.data.packing.rows import MicroBatches
from veomni.data.sources.cache import cache_directory
from veomni.data.sources.dataset import TextDataset
from veomni.data.sources.digests import digest, tokenizer_digest
from veomni.data.sources.formats import MESSAGES
from veomni.data.sources.layout import RecordLayout
from veomni.data.sources.mixture import Mixture, opened_dataset
from veomni.data.text.chat_templates import find_chat_template
from veomni.data.text.on_overflow import check_policy, cut_to_rows
from veomni.data.text.samples import SampleMaker, TextSamples
from veomni.data.text.token_cache import tokenize
from veomni.data.text.transforms import TransformSettings
from veomni.errors import ConfigError, DataError
from veomni.logging import create_logger
from veomni.registry import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = create_logger(__name__)

PACKINGS = ("best_fit", "none")
_ON_THE_WAY = ("multimodal", "preference")
"""Data types that are made into samples while they are read, not tokenised once."""


def build_dataloader(
    dataset: TextDataset | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    *,
    parallel: tuple[int, int] = (0, 1),
    shard: SequenceShard = WHOLE_ROWS,
    micro_batch_size: int = 1,
    global_batch_size: int = 1,
    max_seq_len: int = 2048,
    seed: int = 0,
    shuffle: bool = True,
    packing: str = "best_fit",
    overlong: str = "error",
    num_workers: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool | Literal["auto"] = "auto",
    epochs: int | None = None,
    cache_dir: str | Path | None = None,
    chat_template: str | None = None,
    train: bool = True,
    worker_timeout: float = 300.0,
    balance: bool = False,
    stream_shards: int = 32,
    lookahead: int = 256,
    max_media_tokens: int | None = None,
    samples: SampleMaker | None = None,
) -> PackedDataLoader | StreamLoader:
    """Return a loader of packed rows, the same global order for any layout; no process group is needed.

    Texts, conversations and token ids that are indexed are tokenised once and packed all together: every rank calls
    this, one of them tokenises, the others find the result. Mixtures, streams, preference pairs and conversations with
    media are read, tokenised and packed on the way.

    Args:
        dataset: From :func:`veomni.data.sources.build_dataset`.
        tokenizer: With an end-of-sequence token; its padding token, if any, fills rows.
        parallel: Rank and number of ranks that read different rows.
        shard: Which positions of its rows this rank holds, where several share each (``launcher.sequence_shard``).
        micro_batch_size: Rows of a micro-batch.
        global_batch_size: Rows of an optimizer step, over all ranks and micro-batches.
        max_seq_len: Tokens of a row.
        seed: Decides, with the epoch, the order.
        shuffle: Otherwise rows come in the order of the files. A held-out loader never shuffles.
        packing: ``best_fit`` puts several documents into a row; ``none`` gives each its own.
        overlong: What happens to documents longer than a row: ``error``, ``truncate``, ``split`` or ``drop``.
        num_workers: Processes that make micro-batches ahead; the batches do not depend on it.
        prefetch_factor: Micro-batches that each worker keeps ready.
        pin_memory: Page-locked memory; ``auto`` where there is an accelerator.
        epochs: How often the data is read; None for ever.
        cache_dir: Where tokenised data is kept; None for ``$XDG_CACHE_HOME/veomni`` (``~/.cache/veomni``).
        chat_template: For conversations: a template's name or file; None for the tokenizer's own.
        train: False for held-out data: one pass, in order, from the start at each iteration.
        worker_timeout: Seconds after which a worker that gives nothing is an error.
        balance: Let ranks share the rows of a step by the work in them: the squares of their documents' lengths.
        stream_shards: Virtual shards of a stream. They decide its order, and should be a multiple of the data ranks.
        lookahead: Samples that each virtual shard reads ahead to fill its rows from.
        max_media_tokens: Most tokens of a stream's row that stand for images, videos and sounds; None sets no bound.
        samples: Makes samples of conversations with media (``MediaSamples``); texts have their own.

    Raises:
        DataError: a document cannot be used.
        LayoutError: the batch sizes do not divide.
        ConfigError: an option is unknown.
    """
    if packing not in PACKINGS:
        raise ConfigError(f"data.packing: no packing is called {packing!r}", did_you_mean(packing, list(PACKINGS)))
    check_policy(overlong)
    rank, size = parallel
    settings = LoaderSettings(
        rank, size, micro_batch_size, global_batch_size, seed, shuffle and train, packing, overlong, num_workers,
        prefetch_factor, _pinned(pin_memory), epochs if train else 1, train, worker_timeout, balance,
    )  # fmt: skip
    if isinstance(dataset, TextDataset) and dataset.data_type not in _ON_THE_WAY:
        return _packed(dataset, tokenizer, settings, max_seq_len, shard, cache_dir, chat_template)
    mixture = dataset
    if isinstance(mixture, TextDataset):
        mixture = Mixture([opened_dataset(mixture, "data")])
    if samples is None:
        if mixture.data_type == "multimodal":
            raise ConfigError("conversations with media need a model's processor", "give samples=MediaSamples(...)")
        samples = text_samples(
            [source.layout for source in mixture.sources], tokenizer, max_seq_len, overlong, shard, chat_template
        )
    stopping, passes = _ending(mixture, settings)
    shards = stream_shards if train else 1
    sources = [
        StreamSource(source.name, Units(source.blocks, shards), source.layout, source.weight)
        for source in mixture.sources
    ]
    if stopping == "repeat" or len(sources) > 1:
        for source in sources:
            if source.weight and len(source.units) < shards:
                problem = f"source {source.name!r}: {len(source.units)} records for {shards} virtual shards"
                raise DataError(problem, "give it more records, or lower data.stream_shards")
    plan = StreamPlan(
        sources, samples, shards, seed, settings.shuffle, mixture.weigh_by, stopping, passes, max_seq_len,
        max_media_tokens, packing != "none", lookahead,
    )  # fmt: skip
    facts = {"sources": mixture.facts(cache_directory(cache_dir))} if train else {}
    return StreamLoader(plan, settings, facts | dict(samples.digests))


def _packed(
    dataset: TextDataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: LoaderSettings,
    max_seq_len: int,
    shard: SequenceShard,
    cache_dir: str | Path | None,
    chat_template: str | None,
) -> PackedDataLoader:
    documents, digests = tokenize(dataset, tokenizer, cache_directory(cache_dir), chat_template)
    samples = cut_to_rows(
        documents.lengths,
        max_seq_len,
        settings.overlong,
        lambda document: dataset[int(documents.source[document])].where,
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = MicroBatches(documents, samples, max_seq_len, int(pad or 0), shard)
    return PackedDataLoader(batches, settings, digests)


def text_samples(
    layouts: Sequence[RecordLayout],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    overlong: str,
    shard: SequenceShard,
    chat_template: str | None,
) -> TextSamples:
    """Return what makes samples of sources without media; see :func:`build_dataloader`."""
    renders = any(layout.data_type in ("conversation", "preference") for layout in layouts)
    template = find_chat_template(chat_template, tokenizer) if renders else ""
    digests = {
        "tokenizer": tokenizer_digest(tokenizer),
        "chat template": digest(template),
        "layouts": digest([layout.facts() for layout in layouts]),
    }
    transforms = [(layout.data_type, TransformSettings(layout.text_key, MESSAGES, template)) for layout in layouts]
    return TextSamples(tokenizer, transforms, max_seq_len, overlong, shard, digests)


def _ending(mixture: Mixture, settings: LoaderSettings) -> tuple[str, int]:
    """Return when a stream ends, and after how many passes; see :class:`StreamPlan`."""
    if not settings.train:
        return "once", 1
    if mixture.stopping != "repeat":
        return mixture.stopping, settings.epochs or 1
    if settings.epochs is None:
        return "repeat", 1
    if len(mixture.sources) > 1:
        raise ConfigError(
            "a mixture that repeats its sources has no epochs",
            "set data.stopping to first_exhausted, all_exhausted or once, or leave epochs out (train.max_steps)",
        )
    return "all_exhausted", settings.epochs


def _pinned(asked: bool | Literal["auto"]) -> bool:
    import torch

    available = torch.accelerator.is_available()
    if asked is True and not available:
        logger.warning_once("data.pin_memory is ignored: there is no accelerator to copy to")
    return available and asked is not False
