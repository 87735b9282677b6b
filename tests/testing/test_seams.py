"""Seams resolve to public names, are replaced wherever the library holds them, and are put back."""

from __future__ import annotations

import pytest

from veomni.launcher import Launcher
from veomni.testing import seams
from veomni.testing.seams import Seam, replaced

ALL = {name: seam for name, seam in vars(seams).items() if isinstance(seam, Seam)}


@pytest.mark.parametrize("name", ALL)
def test_every_seam_is_public_and_stands_where_it_is_declared(name):
    seam = ALL[name]
    *classes, last = seam.function.__qualname__.split(".")
    assert not any(part.startswith("_") for part in [*classes, last.strip("_")])
    assert seam.function.__module__.startswith("veomni.")
    assert seam.holders(seam.target)


@pytest.mark.parametrize("name", ALL)
def test_it_is_replaced_everywhere_and_put_back(name):
    seam = ALL[name]
    before = seam.holders(seam.target)
    with replaced(seam, lambda *args: None):
        assert not seam.holders(seam.target)
    assert seam.holders(seam.target) == before


def test_the_original_and_the_arguments_arrive():
    with replaced(seams.GROUP_SIZE, lambda size, state, axis: (size.__name__, state, axis)):
        assert seams.ParallelState.size("a state", "loss") == ("size", "a state", "loss")


def test_a_property_stays_one():
    launcher = Launcher("single", accelerator="cpu")
    with replaced(seams.DATA_PARALLEL, lambda place, owner: owner is launcher):
        assert launcher.data_parallel is True


def test_a_module_imported_meanwhile_is_put_back_too(monkeypatch):
    import sys
    from types import ModuleType

    late = ModuleType("veomni.late")
    with replaced(seams.LOSS_WEIGHT, lambda *args: "replaced"):
        owner = sys.modules[seams.LOSS_WEIGHT.function.__module__]
        late.weight = getattr(owner, seams.LOSS_WEIGHT.function.__name__)
        monkeypatch.setitem(sys.modules, "veomni.late", late)
        assert late.weight({}) == "replaced"
    assert late.weight is seams.LOSS_WEIGHT.target


def test_a_seam_replaced_twice_is_an_error():
    with (
        replaced(seams.STEP_SYNC, lambda *args: None),
        pytest.raises(AssertionError, match="replaced already"),
        replaced(seams.STEP_SYNC, lambda *args: None),
    ):
        pass
