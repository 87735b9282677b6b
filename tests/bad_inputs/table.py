"""The tables: a YAML file for each way in, with inputs by name, the error that each must raise and how it is fixed.

A row holds what is given, ``error`` (a type of :mod:`veomni.errors`), ``problem`` (text of the error, or a pattern
after ``!re``) and ``fix`` (its text). ``DEFAULTS`` are fields that rows need not repeat; tags make bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.bad_inputs.content import MAKERS
from veomni import errors


@dataclass(frozen=True)
class BadInput:
    """One row of a table."""

    table: str
    name: str
    given: dict[str, Any]
    error: type[errors.InputError]
    problem: str | re.Pattern[str]
    fix: str

    def __str__(self) -> str:
        return f"{self.table}: {self.name}"

    def check(self, raised: errors.InputError, error: type[errors.InputError]) -> None:
        kind = next(one for one in type(raised).__mro__ if one.__module__ == errors.__name__)
        assert kind is error, raised
        assert raised.exit_code == errors.EXIT_BAD_INPUT
        assert self.names(raised.problem), raised.problem
        assert raised.fix
        assert self.fix in raised.fix

    def names(self, text: str) -> bool:
        """Whether a text holds the problem."""
        found = self.problem in text if isinstance(self.problem, str) else self.problem.search(text)
        return bool(found)


def load(table: str) -> list[BadInput]:
    """Return the rows of a table."""
    rows = yaml.load((Path(__file__).parent / f"{table}.yaml").read_text(), _Loader)
    defaults = rows.pop("DEFAULTS")
    cases = []
    for name, row in rows.items():
        given = {**defaults, **row}
        error, problem, fix = getattr(errors, given.pop("error")), given.pop("problem"), given.pop("fix", "")
        cases.append(BadInput(table, name, given, error, problem, fix))
    return cases


def made(value: Any) -> Any:
    """Return what is given with its bytes made."""
    if isinstance(value, partial):
        return value()
    if isinstance(value, dict):
        return {key: made(one) for key, one in value.items()}
    return [made(one) for one in value] if isinstance(value, list) else value


class _Loader(yaml.SafeLoader):
    """Rejects a name that a table gives twice, and reads the tags."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        assert len(mapping) == len(node.value), f"a key is given twice {node.start_mark}"
        return mapping


def _pattern(loader: Any, node: Any) -> re.Pattern[str]:
    return re.compile(loader.construct_scalar(node))


def _maker(loader: Any, suffix: str, node: Any) -> partial[Any]:
    return partial(MAKERS[suffix], **loader.construct_mapping(node, deep=True))


_Loader.add_constructor("!re", _pattern)
_Loader.add_multi_constructor("!", _maker)
