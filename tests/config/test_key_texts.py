"""Files below the configuration name Python arguments; keys are added where errors are printed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.config.samples import REPOSITORY, write
from veomni.config.fields import describe
from veomni.config.keys import all_keys
from veomni.errors import LayoutError
from veomni.run_config import Config, load_config

ABOVE = ("veomni/config/", "veomni/cli/", "veomni/run_config/")
KEYS = re.compile(rf"(?<![\w.])({'|'.join(re.escape(key) for key in sorted(all_keys(Config)) if '.' in key)})(?![\w.])")

ARGUMENT = r"(?:[A-Z]\w*[a-z]\w*|build_\w+)\.[a-z_]+"
ARGUMENTS = re.compile(rf"{ARGUMENT}(?: {ARGUMENT})*")


def texts(node: ast.AST) -> Iterator[ast.Constant]:
    """Strings of a file without docstrings, and without those of sections and their checks."""
    for child in ast.iter_child_nodes(node):
        of_sections = isinstance(child, ast.ClassDef) and child.name.endswith("Section")
        checks = isinstance(child, ast.FunctionDef) and child.name == "config_problems"
        docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child
        elif not (of_sections or checks or docstring):
            yield from texts(child)


def files() -> Iterator[tuple[str, ast.Module]]:
    for name in ("veomni", "strategies", "accelerators"):
        for path in sorted((REPOSITORY / name).rglob("*.py")):
            yield path.relative_to(REPOSITORY).as_posix(), ast.parse(path.read_text())


def test_no_file_below_the_configuration_names_a_key() -> None:
    found = []
    for place, tree in files():
        if not place.startswith(ABOVE) and "section" not in place.rpartition("/")[2]:
            found += [f"{place}:{text.lineno}: {text.value}" for text in texts(tree) if KEYS.search(text.value)]
    assert found == []


def test_every_argument_that_an_error_names_has_a_key(tmp_path: Path) -> None:
    load_config([str(write(tmp_path / "a.yaml", {"train.output_dir": str(tmp_path)}))])
    found = []
    for place, tree in files():
        for text in (text for text in texts(tree) if ARGUMENTS.fullmatch(text.value)):
            names = text.value.split()
            keyless = [name for name in names if "in the configuration" not in describe(LayoutError("", "", name))]
            found += [f"{place}:{text.lineno}: {name}" for name in keyless]
    assert found == []


@pytest.mark.parametrize("fields", ["Ulysses.size", "Ulysses.size nothing.known"])
def test_an_error_names_the_key_of_a_run_that_came_from_a_file(tmp_path: Path, fields: str) -> None:
    error = LayoutError("Ulysses has size 3", "give a divisor of 8", field=fields)
    load_config([str(write(tmp_path / "a.yaml", {"train.output_dir": str(tmp_path)}))])
    assert describe(error) == f"{error}\n  in the configuration: train.ulysses_parallel_size"
    assert describe(LayoutError("a", "b")) == "a\n  fix: b"
