"""Loggers: where the numbers of a run go."""

from veomni.loggers.base import Logger, LoggerGroup
from veomni.loggers.jsonl import JsonlLogger
from veomni.loggers.tensorboard import TensorBoardLogger
from veomni.loggers.wandb import WandbLogger

__all__ = ["JsonlLogger", "Logger", "LoggerGroup", "TensorBoardLogger", "WandbLogger"]
