"""The gradient norm and clipping of parameters on several meshes, against all gradients in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.optim.layouts import EXPERTS, INNER, LAYOUTS, give_gradients, gradients, laid_out, whole
from veomni.errors import NonFiniteError
from veomni.strategies.grad_norm import clip_gradients, sharded_grad_norm
from veomni.testing.ranks import RankFailed, run_ranks

NAME = "layers.1.experts.up_proj"


def clipped(layout: str, max_norm: float, missing: int | None = None, spoil: int | None = None):
    """Norm and clipped gradients; one rank may have no gradient for its experts, or an infinite one."""
    model = laid_out(layout)
    give_gradients(model, 0)
    parameter = model.get_parameter(NAME)
    if dist.get_rank() == missing:
        parameter.grad = None
    if dist.get_rank() == spoil:
        parameter.grad.to_local()[0, 0] = torch.inf
    norm = sharded_grad_norm(model.parameters(), torch.device("cpu"))
    clip_gradients(model.parameters(), norm, max_norm)
    if dist.get_rank() == missing:
        parameter.grad = torch.zeros_like(parameter)  # collective from here on: every rank shows its part
    return norm.item(), {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def check(found, expected: dict[str, torch.Tensor], max_norm: float) -> None:
    norm, after = found
    truth = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    assert norm == pytest.approx(truth, rel=1e-12)
    coefficient = min(1.0, max_norm / (truth + 1e-6))
    for name, gradient in expected.items():
        torch.testing.assert_close(after[name], gradient * coefficient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
@pytest.mark.parametrize("layout", ["fsdp2_4", "hsdp", "ep2", "ep2_fsdp2", "hsdp_ep2"])
def test_every_parameter_counts_once(layout, max_norm):
    for found in run_ranks(clipped, LAYOUTS[layout], layout, max_norm):
        check(found, gradients(0), max_norm)


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        ("ep2", (slice(EXPERTS // 2, EXPERTS), slice(None))),
        ("ep2_fsdp2", (slice(EXPERTS // 2, EXPERTS), slice(0, INNER // 2))),
    ],
)
def test_a_rank_whose_experts_have_no_gradient(layout, part):
    expected = gradients(0)
    expected[NAME][part] = 0
    for found in run_ranks(clipped, LAYOUTS[layout], layout, 0.5, missing=1):
        check(found, expected, 0.5)


def test_an_infinite_gradient_of_one_rank_stops_all_of_them():
    with pytest.raises(RankFailed) as caught:
        run_ranks(clipped, 4, "ep2_fsdp2", 1.0, spoil=2)
    assert [type(error) for error in caught.value.exceptions.values()] == [NonFiniteError] * 4


def left_out(layout: str) -> bool:
    """Whether a loop that catches the error finds the gradients as they were."""
    model = laid_out(layout)
    give_gradients(model, 0)
    local = [parameter.grad.to_local() for parameter in model.parameters()]
    local[0][0, 0] = torch.nan
    before = [gradient.clone() for gradient in local]
    norm = sharded_grad_norm(model.parameters(), torch.device("cpu"))
    with pytest.raises(NonFiniteError):
        clip_gradients(model.parameters(), norm, 0.5)
    return all(own.equal(other) for own, other in zip(local[1:], before[1:], strict=True))


def test_gradients_stay_where_the_norm_is_not_finite():
    assert run_ranks(left_out, 2, "fsdp2_2") == [True, True]
