"""The entries of ``data.sources``: what is mixed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from veomni.config.base import PathText, Section

DataType = Literal["plaintext", "conversation", "multimodal", "tokenized", "preference"]
RecordFormat = Literal["messages", "sharegpt", "alpaca"]


class SourceConfig(Section):
    """A source of a mixture; what is null is taken from the keys of the same name in ``data``."""

    path: PathText | Annotated[list[PathText], Field(min_length=1)] = Field(description="As data.train_path.")
    name: str = Field(min_length=1, pattern=r"^[\w.\-]+$", description="What metrics and messages call it.")
    weight: float = Field(default=1.0, ge=0, description="Its share of the mixture, relative to the others'.")
    data_type: DataType | None = Field(default=None, description="What its records become.")
    format: RecordFormat | None = Field(default=None, description="How its records hold conversations.")
    text_key: str | None = Field(default=None, min_length=1, description="Field of the text.")
    messages_key: str | None = Field(default=None, min_length=1, description="Field of the messages.")
    eval_path: PathText | None = Field(default=None, description="Its held-out data, evaluated under its name.")
