"""Tokenized documents in memory-mapped files: tokenized once, read by every rank, worker and later run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from veomni.data.sources.cache import build_once, digest, sampled_digest, tokenizer_digest
from veomni.data.sources.dataset import IndexedDataset
from veomni.data.text.chat_templates import find_chat_template
from veomni.data.text.tokens import Tokens
from veomni.errors import DataError
from veomni.logging import create_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = create_logger(__name__)

_FORMAT = 5
_TOKENS, _CHECKSUM = "tokens.arrow", "checksum"
_BATCH = 512  # documents tokenized together, in parallel by the tokenizers library
_BLOCKS, _BLOCK = 64, 1 << 20  # checked: all of up to 64 MiB


class TokenizedDocuments:
    """Tokenized documents, by index, in one memory-mapped file; pickling sends the path alone: a worker maps the file.

    ``lengths`` are the tokens of each, ``source`` its index in the dataset (some are skipped); int64 ``[documents]``.
    """

    def __init__(self, directory: Path) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self.directory = directory
        table = pa.ipc.open_file(pa.memory_map(str(directory / _TOKENS))).read_all()
        self.lengths: NDArray[np.int64] = pc.list_value_length(table["ids"]).to_numpy()
        self.source: NDArray[np.int64] = table["source"].to_numpy()
        self._ids, self._supervised, self._weights = (table[name] for name in ("ids", "supervised", "weights"))

    def __reduce__(self) -> tuple[type[TokenizedDocuments], tuple[Path]]:
        return type(self), (self.directory,)

    def __len__(self) -> int:
        return len(self.source)

    def part(self, document: int, first: int, length: int) -> Tokens:
        """Return ``length`` tokens of a document, from its token ``first`` on."""

        def values(column: Any) -> Any:
            found = column[document].values
            return None if found is None else found.slice(first, length).to_numpy(zero_copy_only=False)

        weights = values(self._weights)
        return Tokens(values(self._ids), values(self._supervised) if weights is None else weights)


def tokenize(
    dataset: IndexedDataset, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, chat_template: str | None = None
) -> tuple[TokenizedDocuments, dict[str, str]]:
    """Return a dataset's tokenized documents, and the digests they depend on, by name.

    They are kept in ``cache_dir`` under these digests. Several processes may call this at once: one tokenizes, no
    process group is needed. ``chat_template`` is a name or file, or None for the tokenizer's own (conversations only).
    A document that cannot be used, or none of two tokens, is a DataError.
    """
    template = find_chat_template(chat_template, tokenizer) if dataset.schema.type.renders else ""
    digests = {
        "documents": digest(dataset.fingerprint(cache_dir)),
        "tokenizer": tokenizer_digest(tokenizer),
        "chat template": digest(template),
    }
    directory = cache_dir / digest([_FORMAT, digests])
    build_once(directory, lambda path: _write(path, dataset, tokenizer, template), _problem)
    return TokenizedDocuments(directory), digests


def _write(directory: Path, dataset: IndexedDataset, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    import pyarrow as pa

    started, skipped, tokens = time.monotonic(), 0, 0
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    values = {"ids": pa.from_numpy_dtype(dtype), "supervised": pa.bool_(), "weights": pa.float32()}
    schema = pa.schema({"source": pa.int64()} | {name: pa.large_list(kind) for name, kind in values.items()})
    with pa.OSFile(str(directory / _TOKENS), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for first in range(0, len(dataset), _BATCH):
            read = [dataset[index] for index in range(first, min(first + _BATCH, len(dataset)))]
            encoded = dataset.schema.type.encode(read, dataset.schema, tokenizer, template)
            kept = {at: one for at, [one] in enumerate(encoded, first) if len(one) > 1}
            columns = {
                "source": list(kept),
                "ids": [one.ids.astype(dtype) for one in kept.values()],
                "supervised": [None if one.fractional else one.weights for one in kept.values()],
                "weights": [one.weights if one.fractional else None for one in kept.values()],
            }
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
            skipped, tokens = skipped + len(read) - len(kept), tokens + sum(map(len, kept.values()))
    if not tokens:
        fields = "build_dataset.paths RecordSchema.text_key"
        raise DataError("every document is empty after tokenizing", "check the files and text_key", fields)
    (directory / _CHECKSUM).write_text(sampled_digest(directory / _TOKENS, _BLOCKS, _BLOCK))
    if skipped:
        logger.warning("skipped %s documents of %s in which nothing follows the first token", skipped, len(dataset))
    seconds = time.monotonic() - started
    logger.info("tokenized %s documents, %s tokens, in %.1f s", len(dataset) - skipped, tokens, seconds)


def _problem(directory: Path) -> str | None:
    try:
        right = (directory / _CHECKSUM).read_text() == sampled_digest(directory / _TOKENS, _BLOCKS, _BLOCK)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None if right else f"{_TOKENS} does not match its checksum"
