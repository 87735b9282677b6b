"""The section ``data``: what is read and how it becomes rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from veomni.config.base import PathText, Section
from veomni.config.media import MediaConfig
from veomni.config.sources import DataType, RecordFormat, SourceConfig

BUILTIN_CORPORA = (
    "python-stdlib",
    "handwritten-digits-train",
    "handwritten-digits-test",
    "digit-drawings-train",
    "digit-drawings-test",
    "keypad-tones-train",
    "keypad-tones-test",
    "number-words-train",
    "number-words-test",
)
"""Values of ``data.train_path`` and ``data.eval_path`` that need no file (``veomni/data/corpora``)."""


class DataConfig(Section):
    """Sources, templates and packing. Paths are relative to the working directory."""

    train_path: PathText | Annotated[list[PathText], Field(min_length=1)] | None = Field(
        default=None,
        description="Training data: a file, a directory, a URL, or a list of them (text, JSONL, Parquet, Arrow, "
        "WebDataset tar, a saved Hugging Face dataset), or a built-in corpus: python-stdlib (the sources of this "
        "machine's Python), handwritten-digits-train, digit-drawings-train, keypad-tones-train, number-words-train.",
    )
    sources: list[SourceConfig] = Field(
        default=[],
        description="Instead of train_path: what is mixed, each with path, name, weight, eval_path, and, where they "
        "differ from those here, data_type, format, text_key and messages_key. Read as a stream.",
    )
    weigh_by: Literal["sample", "token"] = Field(
        default="sample", description="Whether the weights of sources are shares of the samples or of their tokens."
    )
    stopping: Literal["repeat", "first_exhausted", "all_exhausted", "once"] = Field(
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
        description="Most tokens of a row that stand for images, videos and sounds (a stream's or multimodal).",
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
        description="plaintext learns every token; conversation applies a chat template, learns replies; multimodal "
        "does so with images, videos and sounds; tokenized takes ids as they are; preference takes pairs of answers.",
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
    media: MediaConfig = Field(
        default=MediaConfig(), description="Images, videos and sounds of conversations (data.data_type multimodal)."
    )
    max_seq_len: int = Field(default=2048, ge=2, description="Tokens per packed row.")
    overlong: Literal["error", "truncate", "split", "drop"] = Field(
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
