"""``veomni export``: a checkpoint as a directory that transformers' ``from_pretrained`` reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from veomni.errors import CheckpointError

HELP = "write a checkpoint's model in Hugging Face layout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", type=Path, help="a run's checkpoints/global_step_N directory")
    parser.add_argument("output_dir", type=Path, help="where to write it")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="convert to this format")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Export in this process, one tensor at a time."""
    import torch

    from veomni.checkpoint import read_model_tensors
    from veomni.models import build_config, build_tokenizer, export_tensors_hf

    assets = arguments.checkpoint.resolve().parent.parent / "model_assets"
    if not (assets / "config.json").is_file():
        raise CheckpointError(
            f"{assets} holds no config.json, so the architecture of {arguments.checkpoint} is not known",
            "give a checkpoint inside a run's output_dir",
        )
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    tensors = read_model_tensors(arguments.checkpoint)
    tokenizer = build_tokenizer(assets)
    written = export_tensors_hf(build_config(assets), tensors, arguments.output_dir, tokenizer=tokenizer, dtype=dtype)
    print(written)
