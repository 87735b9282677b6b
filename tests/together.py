"""Rank cases of a module run together: in one fork for some ten of them, at the first whose outcome is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest

from veomni.testing.ranks import RankFailed, run_cases

TOGETHER = 10


class RankCase(Protocol):
    """A hashable case; ``run`` is what each of its ranks calls."""

    ranks: int

    def run(self) -> Any: ...


@dataclass(frozen=True)
class Job:
    """A function on some ranks, as a case; ``given`` are its arguments, which can be hashed."""

    ranks: int
    function: Callable[..., Any]
    given: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return "-".join(map(str, self.given)) or self.function.__name__

    def run(self) -> Any:
        return self.function(*self.given)


@dataclass
class Together:
    """Outcomes of cases, by case: what each rank returned; ``init`` makes the process group for them."""

    waiting: list[Any]
    init: bool = False
    found: dict[Any, list[Any] | RankFailed] = field(default_factory=dict)

    def __call__(self, case: Any) -> list[Any]:
        if case not in self.found:
            others = [other for other in self.waiting if other.ranks == case.ranks and other != case]
            cases = [case, *others[: TOGETHER - 1]]
            self.waiting = [other for other in self.waiting if other not in cases]
            self.found.update(
                zip(cases, run_cases([one.run for one in cases], case.ranks, init=self.init), strict=True)
            )
        outcome = self.found[case]
        if isinstance(outcome, RankFailed):
            raise outcome
        return outcome


def selected(items: Iterable[pytest.Item], module: Any) -> list[Any]:
    """Return the cases (parameters called ``case``) of a module's tests that are to run, in order, each once."""
    cases = (
        item.callspec.params["case"]
        for item in items
        if isinstance(item, pytest.Function) and item.module is module and hasattr(item, "callspec")
        if "case" in item.callspec.params
    )
    return list(dict.fromkeys(cases))
