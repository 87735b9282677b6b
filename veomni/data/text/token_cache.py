"""Tokenized documents in memory-mapped files: tokenized once, read by every rank, worker and later run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
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

_FORMAT = 4
_META = "meta.json"
_BATCH = 512  # documents tokenized together, in parallel by the tokenizers library
_BLOCK = 1 << 20
_CHECKED_BLOCKS = 64


class TokenizedDocuments:
    """Tokenized documents, by index.

    Pickling sends the path alone, so that a worker maps the files itself.

    Attributes:
        offsets: Where each document starts in ``tokens``; int64 ``[documents + 1]``.
        source: Index in the dataset of each document (some are skipped); int64 ``[documents]``.
        tokens: All ids, uint16 or uint32 ``[tokens]``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        meta = json.loads((directory / _META).read_text())
        self.offsets: NDArray[np.int64] = np.load(directory / "offsets.npy")
        self.source: NDArray[np.int64] = np.load(directory / "source.npy")
        self.tokens: NDArray[Any] = np.memmap(directory / "tokens.bin", dtype=meta["dtype"], mode="r")
        self._supervised = self._weights = self._weighted = None
        if "supervised.bin" in meta["files"]:
            self._supervised = np.memmap(directory / "supervised.bin", dtype=np.bool_, mode="r")
        if "weights.bin" in meta["files"]:  # of the documents with fractional weights, and where each starts, or -1
            self._weights = np.memmap(directory / "weights.bin", dtype=np.float32, mode="r")
            self._weighted = np.load(directory / "weighted.npy")

    def __reduce__(self) -> tuple[type[TokenizedDocuments], tuple[Path]]:
        return type(self), (self.directory,)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def part(self, document: int, first: int, length: int) -> Tokens:
        """Return ``length`` tokens of a document, from its token ``first`` on."""
        start = int(self.offsets[document]) + first
        ids, at = self.tokens[start : start + length], -1 if self._weighted is None else int(self._weighted[document])
        if self._weights is not None and at >= 0:
            return Tokens(ids, self._weights[at + first : at + first + length])
        return Tokens(ids, None if self._supervised is None else self._supervised[start : start + length])


def tokenize(
    dataset: IndexedDataset, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, chat_template: str | None = None
) -> tuple[TokenizedDocuments, dict[str, str]]:
    """Return a dataset's tokenized documents, and the digests they depend on, by name.

    Several processes may call this at once: one tokenizes, no process group is needed.

    Args:
        dataset: What to tokenize.
        tokenizer: With what.
        cache_dir: Where results are kept, under a digest of all they depend on.
        chat_template: A template's name or file, or None for the tokenizer's own (conversations only).

    Raises:
        DataError: a document cannot be used, or none has two tokens.
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
    started = time.monotonic()
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    lengths, source, weighted, some_masked = [], [], [], False
    with ExitStack() as stack:
        files = (directory / name for name in ("tokens.bin", "supervised.bin", "weights.bin"))
        ids, supervised, weights = (stack.enter_context(file.open("wb")) for file in files)
        for index, tokens in _encoded(dataset, tokenizer, template):
            given = np.ones(len(tokens), np.bool_) if tokens.weights is None else tokens.weights
            ids.write(tokens.ids.astype(dtype).tobytes())
            supervised.write((given != 0).tobytes())
            weighted.append(weights.tell() // given.itemsize if tokens.fractional else -1)
            weights.write(given.tobytes() if tokens.fractional else b"")
            some_masked = some_masked or tokens.weights is not None
            lengths.append(len(tokens))
            source.append(index)
    if not lengths:
        fields = "build_dataset.paths RecordSchema.text_key"
        raise DataError("every document is empty after tokenizing", "check the files and text_key", fields)
    if not some_masked:
        (directory / "supervised.bin").unlink()
    if max(weighted) < 0:
        (directory / "weights.bin").unlink()
    else:
        np.save(directory / "weighted.npy", np.array(weighted, np.int64))
    np.save(directory / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    np.save(directory / "source.npy", np.array(source, np.int64))
    sums = {path.name: _checksum(path) for path in sorted(directory.iterdir())}
    (directory / _META).write_text(json.dumps({"dtype": dtype.name, "files": sums}))
    if len(lengths) < len(dataset):
        logger.warning("skipped %s empty documents of %s", len(dataset) - len(lengths), len(dataset))
    seconds = time.monotonic() - started
    logger.info("tokenized %s documents, %s tokens, in %.1f s", len(lengths), sum(lengths), seconds)


def _encoded(
    dataset: IndexedDataset, tokenizer: PreTrainedTokenizerBase, template: str
) -> Iterator[tuple[int, Tokens]]:
    """Yield index and tokens of the documents in which something follows the first token."""
    schema = dataset.schema
    for start in range(0, len(dataset), _BATCH):
        documents = [dataset[index] for index in range(start, min(start + _BATCH, len(dataset)))]
        for index, [tokens] in enumerate(schema.type.encode(documents, schema, tokenizer, template), start):
            if len(tokens) > 1:
                yield index, tokens


def _problem(directory: Path) -> str | None:
    try:
        sums = json.loads((directory / _META).read_text())["files"]
        wrong = [name for name, checksum in sums.items() if _checksum(directory / name) != checksum]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{wrong[0]} does not match its checksum" if wrong else None


def _checksum(path: Path) -> str:
    return sampled_digest(path, _CHECKED_BLOCKS, _BLOCK)  # all of it up to 64 MiB
