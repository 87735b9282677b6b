"""``veomni export``: the weights of a checkpoint, of a transformers model as ``from_pretrained`` reads them."""

import argparse
from collections.abc import Sequence

import torch

from veomni.checkpoint import read_model_tensors
from veomni.errors import CheckpointError
from veomni.logging import create_logger
from veomni.models import build_config, build_tokenizer, export_tensors

logger = create_logger(__name__)


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Export in this process, one tensor at a time."""
    assets = arguments.checkpoint.resolve().parent.parent / "model_assets"
    config = tokenizer = None
    if not assets.exists():
        logger.info("%s is not there: the weights are written by the names of the module", assets)
    elif (assets / "config.json").is_file():
        config, tokenizer = build_config(assets), build_tokenizer(assets)
    else:
        problem = f"{assets} holds no config.json, so the architecture of {arguments.checkpoint} is unknown"
        raise CheckpointError(problem, "restore it, or remove model_assets to write the weights by the module's names")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    tensors = read_model_tensors(arguments.checkpoint)
    print(export_tensors(config, tensors, arguments.output_dir, tokenizer=tokenizer, dtype=dtype))
