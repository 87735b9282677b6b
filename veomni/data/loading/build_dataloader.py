"""From documents to a loader: encode, cut, pack."""

from __future__ import annotations

from pathlib import Path

from veomni.data.loading.encoder import Encoder
from veomni.data.loading.options import BatchShape, Order, Packing, Workers
from veomni.data.loading.packed_loader import PackedLoader
from veomni.data.loading.stream_loader import StreamLoader
from veomni.data.loading.stream_plan import StreamPlan, StreamSource
from veomni.data.loading.units import Units
from veomni.data.packing.rows import MicroBatches
from veomni.data.protocols import Documents, DocumentStream
from veomni.data.sources.cache import cache_directory
from veomni.data.sources.opened import Mixing
from veomni.data.text.on_overflow import cut_to_rows
from veomni.data.text.token_cache import tokenize
from veomni.errors import ConfigError, DataError


def build_dataloader(
    dataset: DocumentStream,
    encoder: Encoder,
    *,
    packing: Packing | None = None,
    order: Order | None = None,
    shape: BatchShape | None = None,
    workers: Workers | None = None,
    cache_dir: str | Path | None = None,
) -> PackedLoader | StreamLoader:
    """Return a loader of packed rows, the same global order for any layout; no process group is needed.

    Texts, conversations and token ids that are indexed are tokenized once and packed all together: every rank calls
    this, one of them tokenizes, the others find the result. Mixtures, streams, preference pairs and conversations with
    media are read, tokenized and packed while training.

    Args:
        dataset: From :func:`build_dataset` or :func:`build_mixture`.
        encoder: Turns documents into tokens.
        packing: How documents are put into rows.
        order: In which order, and how often, documents are read.
        shape: Rows of a step, and this rank's share of them.
        workers: Processes that prepare micro-batches.
        cache_dir: Where tokenized data is kept; None for ``$XDG_CACHE_HOME/veomni`` (``~/.cache/veomni``).

    Raises:
        DataError: a document cannot be used.
        ConfigError: an option does not fit the data.
    """
    packing, order, cache = packing or Packing(), (order or Order()).resolved(), cache_directory(cache_dir)
    shape, workers = shape or BatchShape(), workers or Workers()
    if dataset.indexed is not None and dataset.indexed.schema.type.cached:
        batches, digests = _tokenized(dataset.indexed, encoder, packing, shape, cache)
        return PackedLoader(batches, packing, order, shape, workers, digests)
    plan = _stream_plan(dataset, encoder, packing, order, shape)
    facts = {} if order.held_out else {"sources": {one.name: dict(one.fingerprint(cache)) for one in dataset.sources}}
    return StreamLoader(plan, shape, workers, facts | dict(plan.samples.digests))


def _tokenized(
    dataset: Documents, encoder: Encoder, packing: Packing, shape: BatchShape, cache: Path
) -> tuple[MicroBatches, dict[str, str]]:
    documents, digests = tokenize(dataset, encoder.tokenizer, cache, encoder.chat_template)
    samples = cut_to_rows(
        documents.lengths,
        packing.max_seq_len,
        packing.on_overflow,
        lambda document: dataset[int(documents.source[document])].where,
    )
    return MicroBatches(documents, samples, packing.max_seq_len, encoder.pad_token_id, shape.shard), digests


def _stream_plan(
    dataset: DocumentStream, encoder: Encoder, packing: Packing, order: Order, shape: BatchShape
) -> StreamPlan:
    opened = dataset.sources
    samples = encoder.samples([source.schema for source in opened], packing, shape.shard)
    mixing, passes = _ending(dataset, order)
    shards = order.stream_shards
    sources = [StreamSource(one.name, Units(one.blocks, shards), one.schema, one.weight) for one in opened]
    if mixing.stopping_strategy == "repeat" or len(sources) > 1:
        for source in sources:
            if source.weight and len(source.units) < shards:
                problem = f"source {source.name!r}: {len(source.units)} records for {shards} virtual shards"
                raise DataError(problem, "give it more records, or lower stream_shards", "Order.stream_shards")
    return StreamPlan(sources, samples, packing, order, mixing, passes)


def _ending(dataset: DocumentStream, order: Order) -> tuple[Mixing, int]:
    """Return when a stream ends, and after how many passes; see :class:`StreamPlan`."""
    sampling, stopping = dataset.mixing.sampling, dataset.mixing.stopping_strategy
    if order.held_out:
        return Mixing(sampling, "once"), 1
    if stopping != "repeat" or order.epochs is None:
        return dataset.mixing, order.epochs or 1
    if len(dataset.sources) > 1:
        raise ConfigError(
            "a mixture that repeats its sources has no epochs",
            "set stopping_strategy to first_exhausted, all_exhausted or once, or epochs to None",
            "build_mixture.stopping_strategy",
        )
    return Mixing(sampling, "all_exhausted"), order.epochs
