"""The cover has every pair that a case of the whole product has, no case that is forbidden, and far fewer cases."""

from __future__ import annotations

import itertools

import pytest

from tests.pairwise import Matrix, Rule, pairs_of

FACTORS = {"a": range(7), "b": "pqrst", "c": (True, False), "d": ("x", "y", "z"), "e": (1, 2, 4)}
RULES = [
    Rule(("a", "e"), lambda a, e: a < 4 or e > 1),
    Rule(("b", "c", "d"), lambda b, c, d: not (b == "p" and c and d != "z")),
    Rule(("b", "d", "e"), lambda b, d, e: not (b == "q" and (d == "x") == (e == 1))),
]


def product(factors, rules):
    cases = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
    return [case for case in cases if all(rule.allows(case) for rule in rules)]


@pytest.mark.parametrize("rules", [RULES[:0], RULES[:1], RULES], ids=len)
def test_every_pair_is_covered(rules):
    cases, whole = Matrix(FACTORS, rules).cover(), product(FACTORS, rules)
    assert {pair for case in cases for pair in pairs_of(case)} == {pair for case in whole for pair in pairs_of(case)}
    assert all(case in whole for case in cases)
    assert len(cases) <= 1.25 * 7 * 5 < len(whole) / 5
    assert cases == Matrix(FACTORS, rules).cover()


def test_a_value_with_costs_is_in_fewer_cases():
    plain, costly = Matrix(FACTORS, RULES).cover(), Matrix(FACTORS, RULES, {("e", 4): 4}).cover()
    assert {pair for case in costly for pair in pairs_of(case)} == {pair for case in plain for pair in pairs_of(case)}
    assert sum(case["e"] == 4 for case in costly) < sum(case["e"] == 4 for case in plain)


def test_given_cases_come_first_and_count():
    first = [{"a": 3, "b": "q", "c": True, "d": "y", "e": 1}]
    cases = Matrix(FACTORS, RULES).cover(first)
    assert cases[0] == first[0]
    assert sum(case["a"] == 3 and case["b"] == "q" for case in cases) == 1
