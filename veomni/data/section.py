"""The section ``data``: what is read and how it becomes rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from veomni.config.base import PathText, Section
from veomni.config.choice import Name
from veomni.config.paths import exists, is_writable
from veomni.config.problems import Problem
from veomni.data.data_type import DATA_TYPES
from veomni.data.multimodal.section import MediaSection
from veomni.data.sources.corpora import CORPORA
from veomni.data.sources.formats import FORMATS

if TYPE_CHECKING:
    from veomni.data import DocumentStream, Order, PackedLoader, Packing, StreamLoader
    from veomni.launcher import Launcher

DataType = Annotated[str, Name(DATA_TYPES)]
RecordFormat = Annotated[str, Name(FORMATS)]
_RECORD_KEYS = ("data_type", "format", "text_key", "messages_key")


class SourceSection(Section):
    """A source of a mixture; what is null is taken from the keys of the same name in ``data``."""

    path: PathText | Annotated[list[PathText], Field(min_length=1)] = Field(description="As data.train_path.")
    name: str = Field(min_length=1, pattern=r"^[\w.\-]+$", description="What metrics and messages call it.")
    weight: float = Field(default=1.0, ge=0, description="Its share of the mixture, relative to the others'.")
    data_type: DataType | None = Field(default=None, description="What its records become.")
    format: RecordFormat | None = Field(default=None, description="How its records hold conversations.")
    text_key: str | None = Field(default=None, min_length=1, description="Field of the text.")
    messages_key: str | None = Field(default=None, min_length=1, description="Field of the messages.")
    eval_path: PathText | None = Field(default=None, description="Its held-out data, evaluated under its name.")


class DataSection(Section):
    """Sources, templates and packing. Paths are relative to the working directory."""

    configures = ("build_dataset", "build_dataloader", "RecordSchema", "Packing", "Order", "Workers", "Encoder")
    renames: ClassVar[Mapping[str, str]] = {"Packing.strategy": "packing", "build_dataset.paths": "train_path"}

    train_path: PathText | Annotated[list[PathText], Field(min_length=1)] | None = Field(
        default=None,
        description="Training data: a file, a directory, a URL, or a list of them (text, JSONL, Parquet, Arrow, "
        "WebDataset tar, a saved Hugging Face dataset), or a built-in corpus: python-stdlib (the sources of this "
        "machine's Python), handwritten-digits-train, digit-drawings-train, keypad-tones-train, number-words-train.",
    )
    sources: list[SourceSection] = Field(
        default=[],
        description="Instead of train_path: what is mixed, each with path, name, weight, eval_path, and, where they "
        "differ from those here, data_type, format, text_key and messages_key. Read as a stream.",
    )
    sampling: Literal["sample", "token"] = Field(
        default="sample", description="Whether the weights of sources are shares of the samples or of their tokens."
    )
    stopping_strategy: Literal["repeat", "first_exhausted", "all_exhausted", "once"] = Field(
        default="repeat",
        description="When a stream ends before train.max_steps: never; as soon as a source has been read "
        "train.num_train_epochs times and is wanted again; when all have been, shorter ones more often; or once all "
        "have been, and none more often.",
    )
    streaming: bool = Field(
        default=False, description="Read blocks of files as they are needed; false indexes all records first."
    )
    stream_shards: int = Field(
        default=32,
        ge=1,
        description="Virtual shards of a stream, each with an order and rows of its own, whatever the number of ranks; "
        "a multiple of the data ranks.",
    )
    lookahead: int = Field(
        default=256, ge=1, description="Samples that a virtual shard reads ahead to fill its rows from."
    )
    max_media_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of a row that stand for images, videos and audio clips (a stream's or multimodal).",
    )
    balance: bool = Field(
        default=False,
        description="Share the rows of a step among ranks by the work in them, the squares of document lengths.",
    )
    eval_path: PathText | None = Field(default=None, description="Held-out data, read as train_path is.")
    eval_fraction: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the training documents that is held out when eval_path is null.",
    )
    data_type: DataType = Field(
        default="plaintext",
        description="plaintext supervises every token; conversation applies a chat template, supervises replies; "
        "multimodal does so with images, videos and audio clips; pretokenized takes token ids; preference takes pairs "
        "of answers.",
    )
    format: RecordFormat = Field(
        default="messages",
        description="How records hold conversations: {messages: [{role, content}]}, ShareGPT's "
        "{conversations: [{from, value}]}, or Alpaca's {instruction, input, output}.",
    )
    text_key: str = Field(
        default="text", min_length=1, description="Field of a record that holds the text (plaintext)."
    )
    messages_key: str = Field(
        default="messages", min_length=1, description="Field of a record that holds the messages (conversation)."
    )
    chat_template: str | None = Field(
        default=None, description="A registered chat template's name or a Jinja file; null takes the tokenizer's own."
    )
    media: MediaSection = Field(
        default=MediaSection(),
        description="Images, videos and audio clips of conversations (data.data_type multimodal).",
    )
    max_seq_len: int = Field(default=2048, ge=2, description="Tokens per packed row.")
    on_overflow: Literal["error", "truncate", "split", "drop"] = Field(
        default="error",
        description="What happens to a document longer than max_seq_len; all but error are counted and logged.",
    )
    packing: Literal["best_fit", "none"] = Field(
        default="best_fit",
        description="best_fit puts several documents into a row, kept apart; none gives each its own row.",
    )
    shuffle: bool = Field(default=True, description="Read documents in an order drawn from (train.seed, epoch).")
    num_workers: int = Field(
        default=0, ge=0, description="Processes per rank that prepare batches; 0 prepares them in the loop."
    )
    prefetch_factor: int = Field(default=2, ge=1, description="Batches each of the num_workers keeps ready.")
    pin_memory: bool | Literal["auto"] = Field(
        default="auto",
        description="Copy batches to the device from page-locked memory; auto does so where it is of use.",
    )
    cache_dir: PathText | None = Field(
        default=None, description="Where tokenized data is kept between runs; null keeps it in ~/.cache/veomni."
    )
    max_documents: int | None = Field(default=None, ge=1, description="Use only this many documents; null uses all.")

    @property
    def data_types(self) -> set[str]:
        """The types of all data that is trained on."""
        return {source.data_type or self.data_type for source in self.sources} or {self.data_type}

    def open(self, seed: int) -> tuple[DocumentStream, DocumentStream | None]:
        """Return the training documents, indexed or as a stream, and the held-out ones, or None.

        Args:
            seed: Decides which documents ``eval_fraction`` holds out.
        """
        from veomni.data import DataSource, RecordSchema, build_dataset, build_mixture

        given = {key: getattr(self, key) for key in _RECORD_KEYS}
        schema, paths = RecordSchema(**given), self.train_path
        sources = [] if paths is None else [DataSource(paths, schema=schema)]
        held_out_sources = []
        for source in self.sources:
            own = RecordSchema(**{key: getattr(source, key) or value for key, value in given.items()})
            sources.append(DataSource(source.path, source.name, source.weight, own))
            if source.eval_path is not None:
                held_out_sources.append(DataSource(source.eval_path, source.name, schema=own))
        held_out: DocumentStream | None = None
        if held_out_sources:
            held_out = build_mixture(held_out_sources, streaming=False, cache_dir=self.cache_dir)
        elif self.eval_path is not None:
            held_out, _ = build_dataset(self.eval_path, schema, cache_dir=self.cache_dir)
        if paths is None or self.streaming:
            mixture = build_mixture(
                sources,
                streaming=self.streaming,
                sampling=self.sampling,
                stopping_strategy=self.stopping_strategy,
                cache_dir=self.cache_dir,
            )
            return mixture, held_out
        train, split_off = build_dataset(
            paths,
            schema,
            max_documents=self.max_documents,
            eval_fraction=0.0 if self.eval_path else self.eval_fraction,
            seed=seed,
            cache_dir=self.cache_dir,
        )
        return train, held_out or split_off

    def build_loader(
        self, config: Any, dataset: DocumentStream, tokenizer: Any, launcher: Launcher, *, train: bool
    ) -> PackedLoader | StreamLoader:
        """Return the loader of this rank's micro-batches.

        Args:
            config: The whole configuration.
            dataset: From :meth:`open`.
            tokenizer: From ``config.model.build_tokenizer``.
            launcher: Launched; gives the rank's place.
            train: False for held-out data.
        """
        from veomni.data import BatchShape, Encoder, Workers, build_dataloader

        section, (rank, size) = config.train, launcher.data_parallel
        repeats = self.stopping_strategy == "repeat" or not (self.streaming or self.sources)
        epochs = None if section.max_steps is not None and repeats else section.num_train_epochs
        media = any(source.schema.type.encode is None for source in dataset.sources)
        shape = BatchShape(
            section.micro_batch_size, section.global_batch_size, rank, size, launcher.sequence_shard, self.balance
        )
        return build_dataloader(
            dataset,
            self.media.build_encoder(config, tokenizer) if media else Encoder(tokenizer, self.chat_template),
            packing=self.build_packing(),
            order=self.build_order(section.seed, epochs, held_out=not train),
            shape=shape,
            workers=Workers(self.num_workers, self.prefetch_factor, self.pin_memory),
            cache_dir=self.cache_dir,
        )

    def build_packing(self) -> Packing:
        """Return how documents are put into rows."""
        from veomni.data import Packing

        return Packing(self.max_seq_len, self.packing, self.on_overflow, self.lookahead, self.max_media_tokens)

    def build_order(self, seed: int, epochs: int | None, *, held_out: bool = False) -> Order:
        """Return in which order, and how often, documents are read."""
        from veomni.data import Order

        return Order(seed, self.shuffle, epochs, self.stream_shards, held_out)

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
        if self.data_types & {"conversation", "multimodal"}:
            return
        for key, changed in (
            ("chat_template", self.chat_template is not None and "preference" not in self.data_types),
            ("format", self.format != "messages"),
        ):
            if changed:
                problem = f"data.{key} {getattr(self, key)} has no meaning with data.data_type {self.data_type}"
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
