"""From paths to a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

from veomni.data.sources.dataset import TextDataset, open_dataset
from veomni.data.sources.layout import RecordLayout
from veomni.data.sources.mixture import DataSource, Mixture, build_mixture
from veomni.errors import ConfigError


@overload
def build_dataset(
    train_path: str | Sequence[str],
    *,
    streaming: Literal[False] = False,
    data_type: str = ...,
    format: str = ...,
    text_key: str = ...,
    messages_key: str = ...,
    max_documents: int | None = ...,
    eval_fraction: float = ...,
    seed: int = ...,
    cache_dir: str | Path | None = ...,
) -> tuple[TextDataset, TextDataset | None]: ...


@overload
def build_dataset(
    train_path: str | Sequence[str] | None = None,
    *,
    sources: Sequence[DataSource] = ...,
    streaming: bool = ...,
    weigh_by: str = ...,
    stopping: str = ...,
    data_type: str = ...,
    format: str = ...,
    text_key: str = ...,
    messages_key: str = ...,
    max_documents: int | None = ...,
    eval_fraction: float = ...,
    seed: int = ...,
    cache_dir: str | Path | None = ...,
) -> tuple[TextDataset | Mixture, TextDataset | None]: ...


def build_dataset(
    train_path: str | Sequence[str] | None = None,
    *,
    sources: Sequence[DataSource] = (),
    streaming: bool = False,
    weigh_by: str = "sample",
    stopping: str = "repeat",
    data_type: str = "plaintext",
    format: str = "messages",
    text_key: str = "text",
    messages_key: str = "messages",
    max_documents: int | None = None,
    eval_fraction: float = 0.0,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> tuple[TextDataset | Mixture, TextDataset | None]:
    """Open data, and split off a held-out part.

    Whether a document is held out depends on its index and ``seed`` alone, so appending data moves no document across.

    Args:
        train_path: Files, directories, saved Hugging Face datasets, URLs, or ``"python-stdlib"``.
        sources: Instead of ``train_path``: what is mixed, by weight. They are read as a stream.
        streaming: Read blocks of files as they are needed; otherwise all are indexed first.
        weigh_by: Whether the weights of ``sources`` are shares of the ``sample`` s or of the ``token`` s.
        stopping: When a stream ends: ``repeat``, never; ``first_exhausted``, as soon as a source has been read
            ``epochs`` times and is wanted again; ``all_exhausted``, when each has been read that often, shorter ones
            more often; ``once`` likewise, but a source that has been read so often is left out from then on.
        data_type: A registered transform (``plaintext``, ``conversation``, ``tokenized``, ``preference``); or
            ``multimodal``.
        format: How records hold conversations: ``messages``, ``sharegpt`` or ``alpaca``, or a registered one.
        text_key: Field of a record that holds the text.
        messages_key: Field of a record that holds the messages.
        max_documents: Use the first so many documents only.
        eval_fraction: Expected share of the documents that is held out; 0 holds nothing out.
        seed: Seed of the held-out choice.
        cache_dir: Where copies of remote and compressed files are kept; None for ``$XDG_CACHE_HOME/veomni``.

    Returns:
        The training dataset, and the held-out one or None.

    Raises:
        DataError: a path is missing, empty or unreadable, the first record lacks its field, or a part is empty.
        ConfigError: an option is unknown, or does not go with a stream.
    """
    if (train_path is None) == (not sources):
        raise ConfigError("data.train_path and data.sources: one of them names the data", "give exactly one of them")
    layout = RecordLayout(data_type, format, text_key, messages_key)
    paths = [] if train_path is None else [train_path] if isinstance(train_path, str) else list(train_path)
    if not sources and not streaming:
        return open_dataset(paths, layout, max_documents=max_documents, eval_fraction=eval_fraction, seed=seed,
                            cache_dir=cache_dir)  # fmt: skip
    if eval_fraction or max_documents is not None:
        key = "eval_fraction" if eval_fraction else "max_documents"
        raise ConfigError(f"data.{key} chooses documents by their number, and a stream does not count them first",
                          "leave it out; held-out data comes from data.eval_path")  # fmt: skip
    given = sources or [DataSource(paths, None, 1.0, data_type, format, text_key, messages_key)]
    mixture = build_mixture(given, streaming=streaming, weigh_by=weigh_by, stopping=stopping, cache_dir=cache_dir)
    return mixture, None
