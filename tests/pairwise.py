"""Cases in which every pair of values occurs, instead of the whole product; always the same ones.

A fault of a combination is nearly always one of two values (Kuhn et al., 2004, doi:10.1109/TSE.2004.24): a matrix that
has every pair finds it with as many cases as its two longest factors multiply to, not all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


@dataclass(frozen=True)
class Rule:
    """What a case must satisfy: ``holds`` is given the values of ``factors``."""

    factors: tuple[str, ...]
    holds: Callable[..., bool]

    def allows(self, case: Case) -> bool:
        known = all(name in case for name in self.factors)
        return not known or self.holds(*(case[name] for name in self.factors))


@dataclass
class Matrix:
    """Factors by name, with their values (hashable), and rules that forbid combinations.

    ``costs`` are of values whose cases take long: to be chosen, such a value must bring that many more pairs.
    """

    factors: Mapping[str, Sequence[Any]]
    rules: Sequence[Rule] = ()
    costs: Mapping[tuple[str, Any], int] = field(default_factory=dict)
    left: dict[Pair, None] = field(default_factory=dict, repr=False)

    def cover(self, first: Sequence[Case] = ()) -> list[Case]:
        """Return cases with every pair that any case can have; those of ``first`` come first."""
        self.left = dict.fromkeys(self.pairs())
        cases: list[Case] = []
        for case in first:
            self._take(cases, case)
        while self.left:
            pair = next(iter(self.left))
            case = self.case_with(dict(pair))
            if case is None:
                del self.left[pair]  # no case has it
            else:
                self._take(cases, case)
        return cases

    def pairs(self) -> Iterator[Pair]:
        """Yield all pairs of values of two factors that no rule forbids by themselves, of the longest factors first."""
        names = sorted(self.factors, key=lambda name: -len(self.factors[name]))
        for one, two in itertools.combinations(names, 2):
            for a, b in itertools.product(self.factors[one], self.factors[two]):
                if self.allows({one: a, two: b}):
                    yield pair_of(one, a, two, b)

    def allows(self, case: Case) -> bool:
        return all(rule.allows(case) for rule in self.rules)

    def case_with(self, start: Case) -> Case | None:
        """Return a case with the values of ``start`` that brings many of the pairs that are left; None without any."""
        name = next((name for name in self.factors if name not in start), None)
        if name is None:
            return start
        for value in sorted(self.factors[name], key=lambda value: -self._gain(start, name, value)):
            wider = {**start, name: value}
            if self.allows(wider) and (whole := self.case_with(wider)) is not None:
                return whole
        return None

    def _gain(self, case: Case, name: str, value: Any) -> int:
        brought = sum(pair_of(name, value, other, held) in self.left for other, held in case.items())
        return brought - self.costs.get((name, value), 0)

    def _take(self, cases: list[Case], case: Case) -> None:
        cases.append({name: case[name] for name in self.factors})
        for pair in pairs_of(case):
            self.left.pop(pair, None)


def pair_of(one: str, a: Any, two: str, b: Any) -> Pair:
    return ((one, a), (two, b)) if one < two else ((two, b), (one, a))


def pairs_of(case: Case) -> Iterator[Pair]:
    for (one, a), (two, b) in itertools.combinations(case.items(), 2):
        yield pair_of(one, a, two, b)
