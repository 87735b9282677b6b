"""Processes: start the ranks of this node or join the ones a cluster started, watch them, and stop them together."""

from veomni.launch.entrypoint import entrypoint
from veomni.launch.environment import Environment, collective_timeout, detect_environment
from veomni.launch.join import join_or_start
from veomni.launch.signals import StopSignal

__all__ = ["Environment", "StopSignal", "collective_timeout", "detect_environment", "entrypoint", "join_or_start"]
