"""The adapter: passes in order and always closed, patches undone in reverse, nothing left."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from veomni.batch.forward_call import ForwardCall, bind_call, current_call
from veomni.models.adapter.adapter import InputPass, ModelAdapter, Stage


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if scale < 0:
            raise ValueError("negative")
        result: Tensor = self.inner(x) * scale
        return result


class Note(InputPass):
    stage: ClassVar[Stage] = Stage.MEDIA

    def __init__(self, log: list[str], name: str, stage: Stage = Stage.MEDIA, fails: bool = False) -> None:
        self.log, self.name, self.fails = log, name, fails
        self.stage = stage  # type: ignore[misc]

    def before(self, call: ForwardCall) -> None:
        self.log.append(f"before {self.name}")
        if self.fails:
            raise RuntimeError(self.name)

    def after(self, call: ForwardCall, output: Any) -> Any:
        self.log.append(f"after {self.name}")
        return output + 1

    def close(self, call: ForwardCall) -> None:
        self.log.append(f"close {self.name}")


def hooks(model: nn.Module) -> list[int]:
    return [len(hooks) for module in model.modules() for name, hooks in vars(module).items() if name.endswith("_hooks")]


def test_passes_enter_in_the_order_of_stages_and_leave_in_reverse() -> None:
    log: list[str] = []
    model = Net()
    for parameter in model.parameters():
        parameter.data.fill_(0.5)  # so that sums in another order are equal to the bit
    x = torch.ones(1, 2)
    plain = model(x)
    adapter = ModelAdapter.of(model)
    adapter.add(Note(log, "loss", Stage.LOSS))
    adapter.add(Note(log, "first", Stage.PRECISION))
    adapter.add(Note(log, "inner"), on=model.inner)
    assert torch.equal(model(x), plain + 3)
    assert log == [
        "before first", "before loss", "before inner", "after inner", "close inner", "after loss", "after first",
        "close loss", "close first",
    ]  # fmt: skip
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (1, 1)
    assert current_call() is None


@pytest.mark.parametrize("where", ["forward", "pass"])
def test_a_failure_closes_what_was_entered_and_nothing_else(where: str) -> None:
    log: list[str] = []
    model = Net()
    adapter = ModelAdapter.of(model)
    adapter.add(Note(log, "first", Stage.PRECISION))
    adapter.add(Note(log, "second", Stage.MEDIA, fails=where == "pass"))
    adapter.add(Note(log, "third", Stage.LOSS))
    with pytest.raises((ValueError, RuntimeError)):
        model(torch.ones(1, 2), scale=-1.0)
    assert [line for line in log if "close" in line] == [f"close {name}" for name in _entered(where)]
    assert current_call() is None
    log.clear()
    if where == "forward":
        model(torch.ones(1, 2))
        assert len(log) == 9


def _entered(where: str) -> list[str]:
    return ["third", "second", "first"] if where == "forward" else ["second", "first"]


def test_a_pass_changes_arguments_and_an_inner_call_knows_the_outer_one() -> None:
    class Double(InputPass):
        stage = Stage.MEDIA

        def before(self, call: ForwardCall) -> None:
            call.kwargs["scale"] = 2 * call.kwargs.get("scale", 1.0)
            call.shift_labels = torch.ones(1)

    class Look(InputPass):
        stage = Stage.MEDIA

        def before(self, call: ForwardCall) -> None:
            assert call.shift_labels is not None
            assert call.kwargs == {}

    model, x = Net(), torch.ones(1, 2)
    plain = model(x)
    adapter = ModelAdapter.of(model)
    adapter.add(Double())
    adapter.add(Look(), on=model.inner)
    assert torch.equal(model(x, scale=3.0), 6 * plain)


def test_remove_undoes_everything_in_reverse() -> None:
    model, log = Net(), list[str]()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    counts = hooks(model)
    adapter = ModelAdapter.of(model)
    adapter.patch(model.inner, "forward", lambda x: x)
    adapter.patch(model.inner, "forward", lambda x: 2 * x)
    adapter.on_remove(lambda: log.append(str(model.inner.forward(torch.ones(1)).item())))
    adapter.add(Note(log, "note"))
    adapter.hook(model.inner, lambda module, args: None, before=True)
    assert ModelAdapter.of(model) is adapter
    assert adapter.remove() is model
    assert log == ["2.0"]
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert hooks(model) == counts
    assert ModelAdapter.of(model) is not adapter


def test_a_copy_of_an_adapted_model_is_adapted_on_its_own() -> None:
    model = Net()
    ModelAdapter.of(model).patch(model.inner, "forward", abs)
    ModelAdapter.of(model).add(Note([], "note"))
    copy = deepcopy(model)
    adapter = ModelAdapter.of(copy)
    assert adapter.model is copy
    adapter.remove()
    assert not copy._forward_pre_hooks
    assert "forward" not in vars(copy.inner)
    assert "forward" in vars(model.inner)
    assert len(model._forward_pre_hooks) == 1


def test_a_recomputation_is_bound_to_the_call_it_came_from() -> None:
    class Keep(InputPass):
        stage = Stage.LOSS

        def before(self, call: ForwardCall) -> None:
            kept.append((bind_call(current_call), call))

    kept: list[Any] = []
    model = Net()
    ModelAdapter.of(model).add(Keep())
    model(torch.ones(1, 2))
    bound, call = kept[0]
    assert bound() is call
    assert call.args == ()
    assert current_call() is None
