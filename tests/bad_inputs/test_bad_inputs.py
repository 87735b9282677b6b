"""Every row of the tables raises its error by every way, naming the thing and the fix, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bad_inputs.table import BadInput, load, made
from tests.bad_inputs.ways import WAYS, Place
from veomni.errors import InputError


def cases() -> Iterator[object]:
    for table, ways in WAYS.items():
        for case in load(table):
            for way in case.given.get("ways", ways):
                yield pytest.param(case, way, id=f"{case}, {way}".removesuffix(", "))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def place(tmp_path, shared, tokenizer, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, tokenizer, shared, lambda: caplog.text)


@pytest.mark.parametrize(("case", "way"), list(cases()))
def test_it_is_rejected_naming_the_problem_and_the_fix(case: BadInput, way: str, place: Place) -> None:
    given = made({key: value for key, value in case.given.items() if key != "ways"})
    chosen = WAYS[case.table][way]
    with pytest.raises(InputError) as caught:
        chosen.enter(place, **given)
    case.check(caught.value, chosen.error or case.error)
    assert caught.value.problem.startswith(chosen.starts)
    assert "secret" not in str(caught.value)
    assert place.left() == []
