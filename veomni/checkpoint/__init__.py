"""Checkpoints that cannot tear: written beside, hashed, sealed by a manifest, and renamed into place."""

from veomni.checkpoint.checkpointer import Checkpointer
from veomni.checkpoint.sharded_state import read_model_tensors

__all__ = ["Checkpointer", "read_model_tensors"]
