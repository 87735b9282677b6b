"""Datasets and loaders from keywords: each goes to the object that has a field of that name."""

from __future__ import annotations

from dataclasses import fields

from veomni.data import (
    BatchShape,
    DataSource,
    Encoder,
    Order,
    Packing,
    RecordSchema,
    Workers,
    build_dataloader,
    build_dataset,
    build_mixture,
)

PARTS = {"packing": Packing, "order": Order, "shape": BatchShape, "workers": Workers}


def taken(kind, options):
    """Take the fields of a dataclass out of keywords."""
    return {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}


def dataset_of(path, streaming=False, **options):
    """The documents of a path, indexed or streamed."""
    schema = RecordSchema(**taken(RecordSchema, options))
    if streaming:
        return build_mixture([DataSource(path if isinstance(path, list) else str(path), schema=schema)], **options)
    return build_dataset(path if isinstance(path, list) else str(path), schema, **options)[0]


def make_loader(dataset, tokenizer, *, chat_template=None, cache_dir=None, media=None, **options):
    """A loader whose micro-batches are made in the loop and not pinned, unless keywords say otherwise."""
    if "parallel" in options:
        options["rank"], options["size"] = options.pop("parallel")
    parts = {name: kind(**taken(kind, options)) for name, kind in PARTS.items()}
    assert not options, f"no part of a loader has {options}"
    return build_dataloader(dataset, Encoder(tokenizer, chat_template, media), cache_dir=cache_dir, **parts)
