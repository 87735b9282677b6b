"""How a row of each table reaches the library in this interpreter; every way must raise."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tests.bad_inputs.content import GOOD, file_bytes
from tests.config.samples import write
from tests.data.loaders import dataset_of, make_loader
from tests.data.multimodal.families import transform_for
from veomni.data import DataSource, RecordSchema, build_mixture
from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.reader import MediaReader
from veomni.data.multimodal.samples import SkipBadMedia
from veomni.data.sources.records import Document
from veomni.errors import DataError, InputError
from veomni.run_config import check_layout, load_config

WHERE = "train.jsonl, line 12"
USER = {"role": "user", "content": "x"}
ANSWER = {"role": "assistant", "content": "some words"}
LOADER_FILES: dict[str, list[Any]] = {
    "plaintext": [{"text": "fine"}, {"text": "x1" * 40}],
    "conversation": [{"messages": [USER, ANSWER]}],
}
SOURCES: dict[str, list[Any]] = {
    "a": [{"text": "a"}],
    "b": [{"text": "a"}],
    "talks": [{"messages": [USER, ANSWER]}],
    "pairs": [{"prompt": "x", "chosen": "y", "rejected": "z"}],
}


@dataclass
class Place:
    """Where a row is tried: an empty working directory, and what all rows share."""

    folder: Path
    tokenizer: Any
    shared: Path
    log: Callable[[], str]
    inputs: list[Path] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @cached_property
    def reader(self) -> MediaReader:
        """A reader of a folder with files that are no media, and a link that leads out of it."""
        root = self.shared / "media"
        if not root.exists():
            (root / "folder").mkdir(parents=True)
            (root / "page.jpg").write_bytes(b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>")
            (root / "empty.jpg").touch()
            (self.shared / "outside.png").write_bytes(GOOD)
            os.symlink(self.shared / "outside.png", root / "link.png")
        return MediaReader(root, limits=MediaLimits(max_bytes=3_000_000, max_seconds=15))

    def write(self, name: str, content: bytes) -> str:
        """Write an input and return its path."""
        self.inputs.append(self.folder / name)
        self.inputs[-1].write_bytes(content)
        return str(self.inputs[-1])

    def left(self) -> list[Path]:
        """Return the files that are neither inputs nor locks, with what an archive unpacked above the folder."""
        found = [path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
        own = [*self.inputs, *self.cache.glob("files/**/*")]  # a decompressed file is whole, whatever its lines hold
        return [path for path in found if path not in own] + [*self.folder.parent.glob("x.txt")]


# ---------------------------------------------------------------- configurations


def load_configuration(
    place: Place, set: dict[str, Any] | None = None, arguments: Iterable[str] = (), ranks: int = 0
) -> None:
    """Changes to a small file and arguments after it; with ``ranks``, the layout of that many too."""
    place.inputs.append(write(place.folder / "a.yaml", set))
    config = load_config([str(place.inputs[-1]), *arguments])
    if ranks:
        check_layout(config, ranks)


# ---------------------------------------------------------------- text and tokens


def read_file(place: Place, streaming: bool, file: str, options: dict[str, Any] | None = None, **content: Any) -> None:
    """The records of a file, to the last row of a loader."""
    path = place.write(file, file_bytes(**content))
    dataset = dataset_of(path, streaming=streaming, cache_dir=place.cache, **options or {})
    list(make_loader(dataset, place.tokenizer, epochs=1, cache_dir=place.cache, stream_shards=1))


def make_loader_of(place: Place, options: dict[str, Any]) -> None:
    """Options of a loader of two texts, or of one conversation."""
    kind = "conversation" if "chat_template" in options else "plaintext"
    path = place.write("t.jsonl", file_bytes(LOADER_FILES[kind]))
    template, place.tokenizer.chat_template = place.tokenizer.chat_template, None
    try:
        make_loader(dataset_of(path, data_type=kind), place.tokenizer, cache_dir=place.shared, **options)
    finally:
        place.tokenizer.chat_template = template


def mix(place: Place, sources: list[tuple[str, str, float]], schema: dict[str, dict[str, Any]] | None = None,
        mixture: dict[str, Any] | None = None, loader: dict[str, Any] | None = None) -> None:  # fmt: skip
    """Sources (file, name, weight) with options of each file's records, of the mixture and of its loader."""
    paths = {name: place.write(f"{name}.jsonl", file_bytes(lines)) for name, lines in SOURCES.items()}
    given = [
        DataSource(paths.get(file, file), name, weight, RecordSchema(**(schema or {}).get(file, {})))
        for file, name, weight in sources
    ]
    dataset = build_mixture(given, **mixture or {})
    make_loader(dataset, place.tokenizer, cache_dir=place.cache, stream_shards=1, **loader or {})


def open_url(place: Place, streaming: bool, url: str) -> None:
    dataset_of(url, streaming=streaming, cache_dir=place.cache)


# ---------------------------------------------------------------- media


def record_of(given: dict[str, Any]) -> dict[str, Any]:
    """The record of a row: given whole, or asked by a user and answered, with one image, video or audio clip."""
    if "record" in given:
        record: dict[str, Any] = given["record"]
        return record
    for kind in ("image", "video", "audio"):
        if kind in given:
            given = {"ask": f"<{kind}>what?", f"{kind}s": [given[kind]]}
    given = dict(given)
    return {"messages": [{"role": "user", "content": given.pop("ask")}, ANSWER], **given}


def transform(place: Place, model: str, **given: Any) -> None:
    """A record of media, under the policy that ends the run."""
    transform_for(model, place.reader)(Document(record_of(given), WHERE))


def skip(place: Place, model: str, **given: Any) -> None:
    """A record of media is left out and counted; the second one is above the limit."""
    make, document = transform_for(model, place.reader), Document(record_of(given), WHERE)
    skipping = SkipBadMedia(max_skipped=1)
    assert skipping(make, document) is None
    assert skipping.skipped == 1
    assert f"left out record 1 of at most 1: {WHERE}, message 1: " in place.log()
    skipping(make, document)


def never_skip(place: Place, model: str, **given: Any) -> None:
    """A malformed conversation is an error under any policy."""
    SkipBadMedia(9)(transform_for(model, place.reader), Document(record_of(given), WHERE))


@dataclass(frozen=True)
class Way:
    """A function that is given a place and a row; ``error`` is what it raises instead of the row's type."""

    enter: Callable[..., None]
    error: type[InputError] | None = None
    starts: str = ""


INDEXED, STREAMED = partial(read_file, streaming=False), partial(read_file, streaming=True)
WAYS: dict[str, dict[str, Way]] = {
    "config": {"": Way(load_configuration)},
    "files": {"indexed": Way(INDEXED), "streamed": Way(STREAMED)},
    "loader": {"": Way(make_loader_of)},
    "mixture": {"": Way(mix)},
    "urls": {"indexed": Way(partial(open_url, streaming=False)), "streamed": Way(partial(open_url, streaming=True))},
    "media": {
        "error": Way(transform, starts=f"{WHERE}, message 1: "),
        "skip": Way(skip, DataError, "2 records have media that cannot be used, the last one: "),
    },
    "conversation": {"error": Way(transform, starts=WHERE), "skip": Way(never_skip, starts=WHERE)},
}
"""Table to the ways that its rows go; a row that names ``ways`` goes those."""
