"""Conversations about photographs, and this library's own loader over them, which decodes, resizes and packs."""

from __future__ import annotations

import tempfile
from pathlib import Path

WORKERS = 8
"""Processes of each rank that prepare its rows."""


def tokenizer_of():
    from benchmarks.media import SPECIAL, WORDS
    from veomni.data import train_byte_bpe

    tokenizer = train_byte_bpe([" ".join(WORDS)] * 4, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def token_ids(config):
    """Give a model the ids that images have in that tokenizer, and room for all of them."""
    from benchmarks.media import IDS

    tokenizer, text = tokenizer_of(), config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    for key, token in IDS.items():
        setattr(config, key, tokenizer.convert_tokens_to_ids(token))


def write(folder, row):
    """Photographs, conversations, tokenizer and configuration of a row."""
    from benchmarks.media import write_data
    from benchmarks.rows import build_config
    from veomni.data import CHAT_TEMPLATES

    write_data(folder, row.images)
    tokenizer_of().save_pretrained(folder)
    config = build_config(row)
    token_ids(config)
    config.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES.get("qwen-vl"))


def most_pixels(row):
    """Pixels of an image at most: 1,280 tokens, and a quarter of a row."""
    from benchmarks.rows import build_config

    vision = build_config(row).vision_config
    return min(1280, row.length // 4) * (vision.patch_size * vision.spatial_merge_size) ** 2


def image_loader(row, launcher):
    """The loader of a row with ``images``; every rank calls this, and one of them writes the data."""
    from functools import partial

    from veomni.data import build_once
    from veomni.data.sources.cache import lacks
    from veomni.run_config import Config

    folder = Path(tempfile.gettempdir()) / f"veomni_photos_{row.model}_{row.images}_{row.length}"
    build_once(folder, partial(write, row=row), lacks("talks.jsonl"))
    config = Config.model_validate({
        "model": {"model_path": str(folder)},
        "data": {
            "train_path": str(folder / "talks.jsonl"), "data_type": "multimodal", "max_seq_len": row.length,
            "stream_shards": 8, "num_workers": WORKERS, "cache_dir": str(folder / "cache"),
            "media": {"root": str(folder), "image_max_pixels": most_pixels(row)},
        },
        "train": {
            "global_batch_size": row.rows * launcher.data_parallel.size, "micro_batch_size": row.rows,
            "max_steps": 10**6, "output_dir": str(folder),
        },
    })  # fmt: skip
    dataset, _ = config.open_data()
    return config.build_loader(dataset, config.build_tokenizer(dataset), launcher)
