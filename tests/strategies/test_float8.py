"""Float8: its error, what it leaves alone, and that it composes with what else changes a forward."""

from __future__ import annotations

import logging
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.tiny import tiny_config
from veomni.checkpoint.sharded_state import sharded_state
from veomni.errors import ConfigError, DeviceError, MissingExtraError, ModelError
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import (
    DDP,
    FSDP1,
    FSDP2,
    ActivationBudget,
    ActivationCheckpointing,
    Compile,
    ExpertParallel,
    Float8,
    Single,
    TiledMLP,
    Ulysses,
)  # fmt: skip
from veomni.testing.oracle import check, relative_error, truth_of
from veomni.testing.ranks import run_ranks
from veomni.testing.step import train_step

pytest.importorskip("torchao")

EMULATED = partial(Float8, emulate=True)
ROWWISE = partial(Float8, "rowwise", emulate=True)
BOUNDS = {"tensorwise": 0.15, "rowwise": 0.12}
"""Of every gradient of two layers: a cast to e4m3 is off by 2.6 % (root mean square), one to e5m2 by 5 %."""

CASES = {
    "single": (1, "bf16", (Single, EMULATED)),
    "single_fp32_rowwise": (1, "fp32", (Single, ROWWISE)),
    "ddp": (2, "bf16", (DDP, ROWWISE)),
    "fsdp1": (2, "bf16", (FSDP1, EMULATED)),
    "fsdp2_selective": (2, "bf16", (FSDP2, partial(ActivationCheckpointing, "selective"), EMULATED)),
    "fsdp2_async": (2, "fp32", (FSDP2, partial(Ulysses, 2, overlap=True), ROWWISE)),
    "single_tiled": (1, "fp32", (Single, partial(EMULATED, exclude=["*.mlp.*"]), partial(TiledMLP, 5))),
    "fsdp2_offload": (1, "bf16", (partial(FSDP2, cpu_offload=True), EMULATED)),
}


def made(parts) -> list:
    return [part() for part in parts]


def step(model: str, parts, precision: str):
    return train_step(tiny_config(model), partial(made, parts), precision=precision)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_off_by_the_casts_to_float8_and_by_no_more(case):
    ranks, precision, parts = CASES[case]
    truth = truth_of(tiny_config("llama"))
    bound = BOUNDS["rowwise" if ROWWISE in parts else "tensorwise"]
    for outcome in run_ranks(step, ranks, "llama", parts, precision, init=False):
        check(outcome, truth, bound)
        errors = [relative_error(outcome.gradients[name], each) for name, each in truth.gradients.items()]
        assert min(errors) > 0.01  # in fp32 1e-6, in bf16 about 0.01 at most


def test_experts_on_other_ranks_are_left_alone_and_so_are_routers():
    truth = truth_of(tiny_config("qwen2_moe"))
    parts = (FSDP2, partial(ExpertParallel, 2), ROWWISE)
    for outcome in run_ranks(step, 2, "qwen2_moe", parts, "fp32", init=False):
        check(outcome, truth, 0.3)  # tokens whose choice of experts changed have other gradients


def compiled(parts):
    from torch._dynamo.utils import counters

    counters.clear()
    outcome = step("llama", parts, "fp32")
    return outcome, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


def test_compiled_blocks_are_one_graph():
    parts = (FSDP2, partial(Compile, "aot_eager"), EMULATED)
    for outcome, graphs, breaks in run_ranks(compiled, 2, parts, init=False):
        check(outcome, truth_of(tiny_config("llama")), BOUNDS["tensorwise"])
        assert (graphs, breaks) == (1, {})


def ready(model: nn.Module, strategies, **options) -> tuple[Launcher, nn.Module]:
    launcher = Launcher(strategies, **{"accelerator": "cpu", "precision": "fp32", "timeout_seconds": 60, **options})
    launcher.launch()
    return launcher, launcher.setup_model(model)


class Blocks(nn.Module):
    """Two layers of a size that float8 takes, one that it does not, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32)) for _ in range(2)])
        self.layers[1].append(nn.Linear(32, 33))
        self.head = nn.Linear(33, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


Llama = partial(build_model, tiny_config("llama"), weights="random")


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast by hand: the largest value of the tensor becomes the largest of the format."""
    scale = torch.finfo(dtype).max / values.abs().max()
    return (values * scale).to(dtype).float() / scale


def first_layer() -> None:
    launcher, model = ready(Blocks(), [Single(), Float8(emulate=True)])
    linear, rows = model.layers[0][0], torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(1))
    rows.requires_grad_()
    output = linear(rows)
    sent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    output.backward(sent)
    x, w = cast(rows.detach(), torch.float8_e4m3fn), cast(linear.weight.detach(), torch.float8_e4m3fn)
    g = cast(sent, torch.float8_e5m2)
    torch.testing.assert_close(output.detach(), F.linear(x, w, linear.bias.detach()))
    torch.testing.assert_close(rows.grad, g @ w)
    torch.testing.assert_close(linear.weight.grad, g.flatten(0, 1).T @ x.flatten(0, 1))
    torch.testing.assert_close(linear.bias.grad, sent.sum((0, 1)))
    launcher.close()


def test_products_are_those_of_operands_that_were_cast_by_hand():
    run_ranks(first_layer, 1, init=False)


@pytest.mark.parametrize("make", [EMULATED, ROWWISE])
def test_no_token_gives_zero_gradients_and_one_is_padded(make):
    def run(strategy) -> None:
        launcher, model = ready(Blocks(), [Single(), strategy()], precision="bf16")
        model(torch.randn(0, 32)).sum().backward()
        assert all(not parameter.grad.any() for parameter in model.parameters())
        model(torch.randn(1, 32)).sum().backward()
        assert all(parameter.grad.any() for parameter in model.parameters())
        launcher.close()

    run_ranks(run, 1, make, init=False)


def logged(options: dict) -> tuple[list[str], list[str], list[str]]:
    said: list[str] = []
    log = logging.getLogger("veomni.strategies.transforms.float8")
    log.addFilter(lambda record: bool(said.append(record.getMessage())) or True)
    launcher, model = ready(Blocks(), [Single(), Float8(emulate=True, **options)])
    changed = [name for name, each in model.named_modules() if "forward" in vars(each)]
    table = [f"{name} {each.dtype} {type(each).__name__}" for name, each in sharded_state(model, None).items()]
    launcher.close()
    return said, changed, table


def test_what_is_left_out_is_logged_and_checkpoints_are_as_without():
    ((said, changed, table),) = run_ranks(logged, 1, {"exclude": ["layers.0.1"]}, init=False)
    assert said == [
        "float8 (tensorwise): 3 linear layers; left out: 1 excluded, 1 with a size that is no multiple of 16, "
        "1 outside of blocks"
    ]
    assert changed == ["layers.0.0", "layers.1.0", "layers.1.1"]
    assert table == [f"model.{name} torch.float32 Tensor" for name in Blocks().state_dict()]


@pytest.mark.parametrize(
    ("model", "strategy", "options", "error", "problem"),
    [
        (Blocks, Float8, {}, DeviceError, "cpu has no float8 products"),
        (Blocks, EMULATED, {"precision": "fp64"}, ConfigError, "a run in fp64"),
        (partial(nn.Linear, 16, 16), EMULATED, {}, ModelError, "no linear layer to compute: 1 outside of blocks"),
        (Llama, (EMULATED, TiledMLP), {}, ModelError, "no dense MLP, not in float8"),
        (Llama, (EMULATED, partial(ActivationBudget, "2000 MiB", 1 << 20)), {}, ModelError, "not in float8"),
        (Blocks, partial(Float8, emulate=True, exclude=["layer.0"]), {}, ConfigError, "no linear layer matches"),
    ],
)
def test_what_it_cannot_do_is_an_input_error(model, strategy, options, error, problem):
    def run() -> None:
        ready(model(), [Single(), *made(strategy if isinstance(strategy, tuple) else (strategy,))], **options)

    with pytest.raises(Exception, match=problem) as caught:
        run_ranks(run, 1, init=False)
    assert isinstance(caught.value.exceptions[0], error)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingExtraError, match=r"veomni\[torchao\]"):
        Float8()


def test_a_model_is_built_the_same_with_it():
    """What draws random weights does not see it."""
    found = [run_ranks(weights, 1, strategies, init=False)[0] for strategies in ((Single,), (Single, EMULATED))]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def weights(parts) -> list[Tensor]:
    launcher, model = ready(build_model(tiny_config("llama"), weights="random"), made(parts))
    launcher.close()
    return [parameter.detach() for parameter in model.parameters()]
