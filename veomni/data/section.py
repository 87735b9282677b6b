"""The section ``data``: what is read and how it becomes rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field
from typing_extensions import override

from veomni.config.base import PathText, Section
from veomni.config.choice import Choice, configured
from veomni.config.paths import exists, is_writable
from veomni.config.problems import Problem
from veomni.config.section import ComponentSection, options_of
from veomni.data.data_type import DATA_TYPES, DataType
from veomni.data.loading.build_dataloader import build_dataloader
from veomni.data.loading.encoder import Encoder
from veomni.data.multimodal.section import MediaSection
from veomni.data.options import BatchShape, Mixing, Order, Packing, Workers
from veomni.data.sources.corpora import CORPORA
from veomni.data.sources.dataset import build_dataset
from veomni.data.sources.formats import FORMATS
from veomni.data.sources.mixture import DataSource, build_mixture
from veomni.data.sources.schema import RecordSchema

if TYPE_CHECKING:
    from veomni.data import DocumentStream, PackedLoader, StreamLoader
    from veomni.launcher import Launcher

Paths = PathText | Annotated[list[PathText], Field(min_length=1)]
Chosen = Annotated[ComponentSection, Choice(DATA_TYPES)]
Form = Annotated[ComponentSection, Choice(FORMATS)]


class SourceSection(Section):
    """A source of a mixture; what is null is taken from the keys of the same name in ``data``."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    path: Paths
    """As data.train_path."""
    name: str = Field(min_length=1, pattern=r"^[\w.\-]+$")
    """What metrics and messages call it."""
    weight: float = Field(1.0, ge=0)
    """Its share of the mixture, relative to the others'."""
    data_type: Chosen | None = None
    """What its records become."""
    format: Form | None = None
    """How its records hold conversations."""
    text_key: str | None = Field(None, min_length=1)
    """Field of the text."""
    messages_key: str | None = Field(None, min_length=1)
    """Field of the messages."""
    eval_path: PathText | None = None
    """Its held-out data, evaluated under its name."""

    def schema_beside(self, schema: RecordSchema) -> RecordSchema:
        """Return what its records hold, where ``schema`` is that of the other sources."""
        chosen = {key: section.build() for key in ("data_type", "format") if (section := getattr(self, key))}
        named = {key: name for key in ("text_key", "messages_key") if (name := getattr(self, key))}
        return replace(schema, **chosen, **named)


_OPTIONS: Any = options_of(
    RecordSchema, Mixing, build_dataset, Encoder, Packing, Order, BatchShape, Workers, build_dataloader,
    supplied=(
        "data_type", "format", "paths", "seed", "cache_dir", "tokenizer", "epochs", "held_out", "micro_batch_size",
        "global_batch_size", "rank", "size", "timeout", "dataset", "encoder",
    ),
    renames={"build_dataset.paths": "train_path", "Packing.strategy": "packing", "Workers.count": "num_workers"},
)  # fmt: skip


class DataSection(_OPTIONS):
    """Sources, templates and packing. Paths are relative to the working directory."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    train_path: Paths | None = None
    """Training data: a file, a directory, a URL, or a list of them (text, JSONL, Parquet, Arrow, WebDataset tar, a
    saved Hugging Face dataset), or a built-in corpus: python-stdlib (the sources of this machine's Python),
    handwritten-digits-train, digit-drawings-train, keypad-tones-train, number-words-train."""
    sources: list[SourceSection] = Field([])
    """Instead of train_path: what is mixed, each with path, name, weight, eval_path, and, where they differ from those
    here, data_type, format, text_key and messages_key. Read as a stream."""
    streaming: bool = False
    """Read blocks of files as they are needed; false indexes all records first."""
    eval_path: PathText | None = None
    """Held-out data, read as train_path is."""
    data_type: Chosen = configured(
        "plaintext",
        "plaintext supervises every token; conversation applies a chat template, supervises replies; multimodal does "
        "so with images, videos and audio clips; pretokenized takes token ids; preference takes pairs of answers.",
    )
    format: Form = configured(
        "messages",
        "How records hold conversations: {messages: [{role, content}]}, ShareGPT's {conversations: [{from, value}]}, "
        "or Alpaca's {instruction, input, output}.",
    )
    media: MediaSection = MediaSection()
    """Images, videos and audio clips of conversations (data.data_type multimodal)."""
    cache_dir: PathText | None = None
    """Where tokenized data is kept between runs; null keeps it in ~/.cache/veomni."""

    @property
    def types(self) -> list[DataType]:
        """The types of all data that is trained on."""
        chosen = [source.data_type or self.data_type for source in self.sources]
        return [section.build() for section in chosen or [self.data_type]]

    @property
    def has_media(self) -> bool:
        """Whether some data holds images, videos or audio clips."""
        return any(one.has_media for one in self.types)

    def open(self, seed: int) -> tuple[DocumentStream, DocumentStream | None]:
        """Return the documents to train on and those held out; ``seed`` decides which ``eval_fraction`` holds out."""
        schema = self.make(RecordSchema, data_type=self.data_type.build(), format=self.format.build())
        sources = [DataSource(self.train_path, schema=schema)] if self.train_path else []
        named = [(one, one.schema_beside(schema)) for one in self.sources]
        sources += [one.make(DataSource, schema=own) for one, own in named]
        evaluated = [DataSource(one.eval_path, one.name, schema=own) for one, own in named if one.eval_path]
        held_out: DocumentStream | None = None
        if evaluated:
            held_out = build_mixture(evaluated, streaming=False, cache_dir=self.cache_dir)
        elif self.eval_path is not None:
            held_out, _ = build_dataset(self.eval_path, schema, cache_dir=self.cache_dir)
        if self.sources or self.streaming:
            return self.make(build_mixture, sources=sources), held_out
        fraction = 0.0 if self.eval_path else self.eval_fraction
        train, split_off = self.make(build_dataset, schema=schema, eval_fraction=fraction, seed=seed)
        return train, held_out or split_off

    def build_loader(
        self, config: Any, dataset: DocumentStream, tokenizer: Any, launcher: Launcher, *, train: bool
    ) -> PackedLoader | StreamLoader:
        """Return the loader of this rank's micro-batches of a dataset that :meth:`open` returned.

        ``config`` is the whole configuration; ``launcher``, which was launched, gives the rank's place.
        """
        section, (rank, size) = config.train, launcher.data_parallel
        repeats = self.stopping_strategy == "repeat" or not (self.streaming or self.sources)
        epochs = None if section.max_steps is not None and repeats else section.num_train_epochs
        media = any(source.schema.type.has_media for source in dataset.sources)
        encoder = self.media.build_encoder(config, tokenizer) if media else self.make(Encoder, tokenizer=tokenizer)
        order = self.make(Order, seed=section.seed, epochs=epochs, held_out=not train)
        sizes = {"micro_batch_size": section.micro_batch_size, "global_batch_size": section.global_batch_size}
        shape = self.make(BatchShape, **sizes, rank=rank, size=size, shard=launcher.sequence_shard)
        parts = {"packing": self.make(Packing), "order": order, "shape": shape, "workers": self.make(Workers)}
        return build_dataloader(dataset, encoder, **parts, cache_dir=self.cache_dir)

    @override
    def path_problems(self) -> Iterator[Problem]:
        named = {"data.train_path": self.train_path, "data.eval_path": self.eval_path}
        for number, source in enumerate(self.sources):
            named |= {f"data.sources.{number}.{key}": getattr(source, key) for key in ("path", "eval_path")}
        for key, given in named.items():
            for path in [given] if isinstance(given, str) else given or []:
                if path not in CORPORA and not ("://" in path and not path.startswith("file://")):
                    yield from exists(key, path.removeprefix("file://"))
        if self.cache_dir is not None:
            yield from is_writable("data.cache_dir", self.cache_dir)

    @override
    def problems(self, config: Any, world: int | None) -> Iterator[Problem]:
        yield from self._held_out_problems(config.train)
        yield from self._source_problems()
        if self.streaming or self.sources:
            yield from self._stream_problems(config.train)
        types = self.types
        for key, changed, used in (
            ("chat_template", self.chat_template is not None, any(one.renders for one in types)),
            ("format", self.format.chosen != "messages", any(one.converts for one in types)),
        ):
            if changed and not used:
                given = self.format.chosen if key == "format" else self.chat_template
                problem = f"data.{key} {given} has no meaning with data.data_type {self.data_type.chosen}"
                yield Problem(problem, "leave it out, or set data.data_type to conversation or multimodal")

    def _held_out_problems(self, train: Any) -> Iterator[Problem]:
        if self.eval_path is not None and self.eval_fraction:
            problem = "data.eval_path and data.eval_fraction both choose held-out data"
            yield Problem(problem, "set data.eval_fraction to 0")
        named = [number for number, source in enumerate(self.sources) if source.eval_path is not None]
        if named and self.eval_path is not None:
            yield Problem(f"data.eval_path and data.sources.{named[0]}.eval_path both name held-out data", "give one")
        if train.eval.every_steps is not None and not (self.eval_path or self.eval_fraction or named):
            yield Problem(
                "train.eval.every_steps is set but there is no held-out data",
                "set data.eval_path, data.eval_fraction or a source's eval_path, or train.eval.every_steps to null",
            )

    def _source_problems(self) -> Iterator[Problem]:
        if self.train_path is None and not self.sources:
            yield Problem("data.train_path is missing, and so is data.sources", "give --data.train_path VALUE")
        if self.train_path is not None and self.sources:
            yield Problem("data.train_path and data.sources both name the training data", "give one of them")
        names = [source.name for source in self.sources]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Problem(f"data.sources: two sources are called {name!r}", "give each a name of its own")
        if self.sources and not any(source.weight for source in self.sources):
            yield Problem("data.sources: the weights sum to zero", "give one source a weight above 0")

    def _stream_problems(self, train: Any) -> Iterator[Problem]:
        if train.max_steps is None:
            yield Problem("the length of a stream is unknown, and train.max_steps is null", "set train.max_steps")
        for key in ("eval_fraction", "max_documents"):
            if getattr(self, key):
                problem = f"data.{key} chooses documents by number, and a stream does not number them"
                yield Problem(problem, "use data.eval_path")
