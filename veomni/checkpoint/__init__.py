"""Checkpoints that cannot tear: written beside, hashed, sealed by a manifest, and renamed into place."""

from veomni.checkpoint.checkpointer import Checkpointer
from veomni.checkpoint.reader import read_model_tensors

__all__ = ["Checkpointer", "read_model_tensors"]
