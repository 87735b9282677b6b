"""The contract with transformers: every private name that veomni declares is there, with the parameters it passes.

When one fails after an upgrade of transformers, a module of ``transformers_api`` is the only file to change.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import transformers

import veomni
from veomni.compat.private_name import PrivateName
from veomni.models import transformers_api
from veomni.models.transformers_api.private_names import PRIVATE

PACKAGE = Path(veomni.__file__).parent
HOME = Path(transformers_api.__file__).parent


@pytest.mark.parametrize("name", PRIVATE, ids=lambda name: name.path.partition(":")[2])
def test_the_name_is_there_and_takes_what_is_passed(name: PrivateName) -> None:
    found = name.resolve()
    assert name.reason
    assert name.without
    if name.parameters:
        assert set(name.parameters) <= set(inspect.signature(found).parameters)


def test_each_is_declared_once() -> None:
    paths = [name.path for name in PRIVATE]
    assert len(paths) == len(set(paths)) > 30


def test_no_other_file_imports_what_is_not_exported() -> None:
    offenders = []
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "examples").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            inner = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers.")
            absent = (
                isinstance(node, ast.ImportFrom)
                and node.module == "transformers"
                and not all(hasattr(transformers, alias.name) for alias in node.names)
            )
            if (inner or absent) and path.parent != HOME:
                offenders.append(f"{path}:{node.lineno}")
    assert offenders == []
