"""From documents to a loader: encode, cut, pack."""

from pathlib import Path

from veomni.data.loading.encoder import Encoder
from veomni.data.loading.packed_loader import PackedLoader
from veomni.data.loading.stream_loader import StreamLoader
from veomni.data.loading.stream_plan import StreamPlan
from veomni.data.options import BatchShape, Mixing, Order, Packing, Workers
from veomni.data.packing.rows import MicroBatches
from veomni.data.sources.cache import cache_directory
from veomni.data.sources.dataset import DocumentStream
from veomni.data.text.on_overflow import cut_to_rows
from veomni.data.text.token_cache import tokenize
from veomni.data.text.tokens import padding_token
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
        dataset: From :func:`~veomni.data.build_dataset` or :func:`~veomni.data.build_mixture`.
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
    shape, workers, indexed = shape or BatchShape(), workers or Workers(), dataset.indexed
    if indexed is not None and indexed.schema.type.cached:
        documents, digests = tokenize(indexed, encoder.tokenizer, cache, encoder.chat_template)
        pieces = cut_to_rows(
            documents.lengths, packing.max_seq_len, packing.on_overflow,
            lambda document: indexed[int(documents.source[document])].where,
        )  # fmt: skip
        batches = MicroBatches(documents, pieces, packing.max_seq_len, padding_token(encoder.tokenizer), shape.shard)
        return PackedLoader(batches, packing, order, shape, workers, digests)
    schemas = [source.schema for source in dataset.sources]
    samples = encoder.samples(schemas, packing, shape.shard)
    plan = StreamPlan(dataset.sources, samples, packing, order, *_ending(dataset, order))
    _check_shards(plan)
    facts = {} if order.held_out else {"sources": dataset.fingerprint(cache)}
    return StreamLoader(plan, shape, workers, facts | encoder.digests(schemas))


def _check_shards(plan: StreamPlan) -> None:
    """Check that every shard of sources that must not end has something to read."""
    shards = plan.order.stream_shards
    if plan.mixing.stopping_strategy != "repeat" and len(plan.sources) == 1:
        return
    for source, units in zip(plan.sources, plan.units, strict=True):
        if source.weight and len(units) < shards:
            problem = f"source {source.name!r}: {len(units)} records for {shards} virtual shards"
            raise DataError(problem, "give it more records, or lower stream_shards", "Order.stream_shards")


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
            "Mixing.stopping_strategy",
        )
    return Mixing(sampling, "all_exhausted"), order.epochs
