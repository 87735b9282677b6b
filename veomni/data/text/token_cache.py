"""Tokenized documents in memory-mapped files: tokenized once, read by every rank, worker and later run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from veomni.data.data_type import Encoded
from veomni.data.sources.cache import build_once, digest, tokenizer_digest
from veomni.data.sources.dataset import IndexedDataset
from veomni.data.sources.records import Document
from veomni.data.text.chat_templates import find_chat_template
from veomni.data.text.token_weights import TokenWeights, token_weights
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
    """Token ids of documents, by index.

    Pickling sends the path alone, so that a worker maps the files itself.

    Attributes:
        offsets: Where each document starts in ``tokens``; int64 ``[documents + 1]``.
        source: Index in the dataset of each document (some are skipped); int64 ``[documents]``.
        tokens: All ids, uint16 or uint32 ``[tokens]``.
        learned: bool ``[tokens]``, whether a loss is taken; None learns all.
        weights: float32, what the losses of tokens weigh, of the documents in which some weight is neither 0 nor 1, one
            after another; None where there is none.
        weighted: Where each document starts in ``weights``, -1 for those that are not in it; int64 ``[documents]``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        meta = json.loads((directory / _META).read_text())
        self.offsets: NDArray[np.int64] = np.load(directory / "offsets.npy")
        self.source: NDArray[np.int64] = np.load(directory / "source.npy")
        self.tokens: NDArray[Any] = np.memmap(directory / "tokens.bin", dtype=meta["dtype"], mode="r")
        self.supervised: NDArray[np.bool_] | None = None
        if "supervised.bin" in meta["files"]:
            self.supervised = np.memmap(directory / "supervised.bin", dtype=np.bool_, mode="r")
        self.weights: NDArray[np.float32] | None = None
        if "weights.bin" in meta["files"]:
            self.weights = np.memmap(directory / "weights.bin", dtype=np.float32, mode="r")
            self.weighted: NDArray[np.int64] = np.load(directory / "weighted.npy")

    def __reduce__(self) -> tuple[type[TokenizedDocuments], tuple[Path]]:
        return type(self), (self.directory,)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def part(self, document: int, first: int, length: int) -> tuple[NDArray[Any], TokenWeights | None]:
        """Return some tokens of a document, and what their losses weigh; None weighs all 1.

        Args:
            document: Its index.
            first: The first of its tokens that is wanted.
            length: How many are.
        """
        taken = slice(start := int(self.offsets[document]) + first, start + length)
        if self.weights is not None and self.weighted[document] >= 0:
            at = int(self.weighted[document]) + first
            return self.tokens[taken], self.weights[at : at + length]
        return self.tokens[taken], None if self.supervised is None else self.supervised[taken]


def tokenize(
    dataset: IndexedDataset, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, chat_template: str | None = None
) -> tuple[TokenizedDocuments, dict[str, str]]:
    """Return a dataset's tokenized documents, from ``cache_dir`` if they are there.

    Several processes may call this at once: one tokenizes, no process group is needed.

    Args:
        dataset: What to tokenize.
        tokenizer: With what.
        cache_dir: Where results are kept, under a digest of all they depend on.
        chat_template: A template's name or file, or None for the tokenizer's own (conversations only).

    Returns:
        The documents, and the digests they depend on, by name: ``documents``, ``tokenizer``, ``chat template``.

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
    lengths, source, weighted, some_masked, stored = [], [], [], False, 0
    files = (directory / name for name in ("tokens.bin", "supervised.bin", "weights.bin"))
    with ExitStack() as stack:
        tokens, supervised, weights = (stack.enter_context(file.open("wb")) for file in files)
        for index, encoded in _encoded(dataset, tokenizer, template):
            if len(encoded.ids) < 2:  # nothing follows the first token
                continue
            tokens.write(np.array(encoded.ids, dtype).tobytes())
            given = token_weights(encoded.weights)
            some_masked = some_masked or given is not None
            supervised.write(b"\1" * len(encoded.ids) if given is None else (given != 0).tobytes())
            fractions = given is not None and given.dtype == np.float32
            weighted.append(stored if fractions else -1)
            if given is not None and fractions:
                weights.write(given.tobytes())
                stored += len(given)
            lengths.append(len(encoded.ids))
            source.append(index)
    if not lengths:
        raise DataError(
            "every document is empty after tokenizing",
            "check the files and text_key",
            "build_dataset.paths RecordSchema.text_key",
        )
    if not some_masked:
        (directory / "supervised.bin").unlink()
    if stored:
        np.save(directory / "weighted.npy", np.array(weighted, np.int64))
    else:
        (directory / "weights.bin").unlink()
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
) -> Iterator[tuple[int, Encoded]]:
    schema = dataset.schema
    for start in range(0, len(dataset), _BATCH):
        stop = min(start + _BATCH, len(dataset))
        documents: list[Document] = [dataset[index] for index in range(start, stop)]
        yield from enumerate(schema.type.encode(documents, schema, tokenizer, template), start)


def _problem(directory: Path) -> str | None:
    try:
        sums = json.loads((directory / _META).read_text())["files"]
        wrong = [name for name, checksum in sums.items() if _checksum(directory / name) != checksum]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{wrong[0]} does not match its checksum" if wrong else None


def _checksum(path: Path) -> str:
    """Return a digest of a file's size and of up to 64 blocks of 1 MiB spread over it: all of it up to 64 MiB."""
    size = path.stat().st_size
    blocks = -(-size // _BLOCK)
    hashed = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        for block in sorted({int(at) for at in np.linspace(0, max(blocks - 1, 0), min(blocks, _CHECKED_BLOCKS))}):
            file.seek(block * _BLOCK)
            hashed.update(file.read(_BLOCK))
    return hashed.hexdigest()
