"""No name that another package keeps private is used outside of the two packages that are made for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import veomni

PACKAGE = Path(veomni.__file__).parent
ROOTS = (PACKAGE, *(PACKAGE.parent / name for name in ("strategies", "accelerators", "examples", "benchmarks")))
ALLOWED = (PACKAGE / "compat", PACKAGE / "models" / "transformers_api")
OWN = ("self", "cls", "ctx")
ACCESS = ("getattr", "hasattr", "setattr", "delattr")
PUBLIC = ("_replace", "_fields", "_make", "_exit")  # of namedtuple and os, documented


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in ("_", *PUBLIC)


def defined(tree: ast.AST) -> set[str]:
    """Return the private names that a file defines: functions, classes, variables, fields and attributes of self."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and base(node) in OWN:
            names.add(node.attr)
    return names


def base(node: ast.Attribute) -> str | None:
    return node.value.id if isinstance(node.value, ast.Name) else None


def uses(tree: ast.AST) -> Iterator[str]:
    """Yield the private names of other objects and modules that a file uses, by attribute, string or import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and base(node) not in OWN:
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ACCESS:
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("veomni"):
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)


def foreign(source: str) -> set[str]:
    tree = ast.parse(source)
    own = defined(tree)
    return {name for name in uses(tree) if private(name) and name not in own}


def test_no_private_name_of_another_package_is_used() -> None:
    offenders = []
    for path in (path for root in ROOTS for path in sorted(root.rglob("*.py"))):
        name = str(path.relative_to(PACKAGE.parent))
        if not any(home in path.parents for home in ALLOWED):
            offenders += [f"{name}: {use}" for use in foreign(path.read_text())]
    assert offenders == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._foreach_mul_(x)", "from torch.utils import _python_dispatch", "import torch._C",
        "getattr(model, '_no_split')", "from torch.distributed.fsdp._fully_shard import x", "model.config._attn = 1",
    ],
)  # fmt: skip
def test_a_private_name_is_found(source: str) -> None:
    assert foreign(source)


@pytest.mark.parametrize("source", ["class A:\n  def _x(self): self._x()\nA()._x()", "a.__dict__", "_, b = 1, 2"])
def test_a_file_may_use_its_own(source: str) -> None:
    assert not foreign(source)
