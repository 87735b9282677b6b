"""The ``veomni`` command."""

from veomni.cli.main import main

__all__ = ["main"]
