"""From a dataset to a loader: tokenise, cut, pack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from veomni.data.cache import cache_directory
from veomni.data.dataset import TextDataset
from veomni.data.loader import LoaderSettings, PackedDataLoader
from veomni.data.overlong import cut_to_rows
from veomni.data.rows import MicroBatches
from veomni.data.token_cache import tokenize
from veomni.errors import ConfigError
from veomni.logging import create_logger
from veomni.registry import did_you_mean
from veomni.sequence_split import WHOLE_ROWS, SequencePart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = create_logger(__name__)

PACKINGS = ("best_fit", "none")


def build_dataloader(
    dataset: TextDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    parallel: tuple[int, int] = (0, 1),
    part: SequencePart = WHOLE_ROWS,
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
) -> PackedDataLoader:
    """Tokenise a dataset once and return a loader of packed rows, the same global order for any layout.

    No process group is needed: every rank calls this, one of them tokenises, the others find the result.

    Args:
        dataset: From :func:`veomni.data.build_dataset`.
        tokenizer: With an end-of-sequence token; its padding token, if any, fills rows.
        parallel: Rank and number of ranks that read different rows.
        part: Which positions of its rows this rank holds, where several share each (``launcher.sequence_part``).
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

    Raises:
        DataError: a document cannot be used.
        LayoutError: the batch sizes do not divide.
        ConfigError: an option is unknown.
    """
    if packing not in PACKINGS:
        raise ConfigError(f"data.packing: no packing is called {packing!r}", did_you_mean(packing, list(PACKINGS)))
    rank, size = parallel
    settings = LoaderSettings(
        rank, size, micro_batch_size, global_batch_size, seed, shuffle and train, packing, overlong, num_workers,
        prefetch_factor, _pinned(pin_memory), epochs if train else 1, train, worker_timeout,
    )  # fmt: skip
    documents, digests = tokenize(dataset, tokenizer, cache_directory(cache_dir), chat_template)
    samples = cut_to_rows(
        documents.lengths, max_seq_len, overlong, lambda document: dataset[int(documents.source[document])].where
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = MicroBatches(documents, samples, max_seq_len, int(pad or 0), part)
    return PackedDataLoader(batches, settings, digests)


def _pinned(asked: bool | Literal["auto"]) -> bool:
    import torch

    available = torch.accelerator.is_available()
    if asked is True and not available:
        logger.warning_once("data.pin_memory is ignored: there is no accelerator to copy to")
    return available and asked is not False
