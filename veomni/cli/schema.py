"""``veomni schema``: the configuration's JSON schema, for editors and for reading."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

HELP = "print the JSON schema of the configuration; every key has its description"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: there are none."""


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the schema."""
    from veomni.run_config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))
