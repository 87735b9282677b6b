"""Muon against the singular value decomposition, against PyTorch's own, and in every layout against one process."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.tiny import tiny_config
from tests.optim.layouts import (
    LAYOUTS,
    MATRICES,
    Model,
    dense_mesh,
    fsdp1_with_experts,
    give_gradients,
    gradients,
    laid_out,
    new_model,
    values,
)
from veomni.errors import ConfigError, ModelError
from veomni.optim import MultiOptimizer, Muon, build_optimizer, hidden_matrices, matrix_owners
from veomni.optim.matrix_owners import Matrix
from veomni.optim.muon import orthogonalize
from veomni.testing.ranks import RankFailed, run_ranks

OPTIONS = {
    "name": "muon", "lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.2, "momentum": 0.8, "no_decay": (),
}  # fmt: skip
A, B, C = 3.4445, -4.7750, 2.0315


def by_svd(matrix: Tensor, steps: int = 5) -> Tensor:
    """What Newton-Schulz computes, from the singular values."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    singular = singular / singular.norm().clamp(min=1e-7)
    for _ in range(steps):
        singular = A * singular + B * singular**3 + C * singular**5
    return left @ torch.diag(singular) @ right


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (2, 30)])
@pytest.mark.parametrize("steps", [1, 5])
def test_orthogonalising_maps_the_singular_values_and_keeps_the_vectors(shape, steps):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64) * 50
    matrices[1] = matrices[1, :1].clone()  # of rank 1
    for found, matrix in zip(orthogonalize(matrices, steps), matrices, strict=True):
        torch.testing.assert_close(found, by_svd(matrix, steps), rtol=1e-10, atol=1e-12)


def test_a_matrix_of_zeros_stays_one():
    assert not orthogonalize(torch.zeros(2, 3, 4, dtype=torch.float64), 5).any()


def names_of(model: nn.Module, **options) -> list[str]:
    chosen = set(hidden_matrices(model, **options))
    return [name for name, parameter in model.named_parameters() if parameter in chosen]


def test_matrices_of_blocks_are_chosen_and_nothing_else():
    model = new_model()
    model.layers[0].gate = nn.Linear(6, 1, bias=False)  # a vector
    model.layers[0].positions = nn.Embedding(4, 4)
    model.layers[0].mix = nn.Conv1d(6, 6, 3)
    model.layers[0].scale = nn.Parameter(torch.ones(4, 4))
    assert names_of(model) == MATRICES
    model.layers[1].tall.requires_grad_(False)
    assert names_of(model, exclude=["*.up_proj", "layers.0.wide"]) == [
        "layers.0.tall.weight", "layers.0.experts.down_proj", "layers.1.wide.weight", "layers.1.experts.down_proj",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"(?s)exclude: no parameter matches '\*\.up'"):
        hidden_matrices(model, exclude=["*.up"])


def test_a_matrix_that_is_also_the_embedding_is_left_to_adamw():
    model = new_model()
    model.layers[0].out = nn.Linear(6, 10, bias=False)
    model.layers[0].out.weight = model.embed.weight
    assert names_of(model) == MATRICES


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        (
            "qwen3_moe",
            {"self_attn.q_proj.weight", "mlp.gate.weight", "mlp.experts.gate_up_proj"},
            {"input_layernorm.weight"},
        ),
        ("gpt_oss", {"mlp.router.weight", "mlp.experts.down_proj"}, {"mlp.experts.down_proj_bias", "self_attn.sinks"}),
    ],
)
def test_the_matrices_of_real_models(name, inside, outside):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(name))
    chosen = set(names_of(model))
    assert {f"model.layers.0.{name}" for name in inside} <= chosen
    assert chosen.isdisjoint({f"model.layers.0.{name}" for name in outside})
    assert chosen.isdisjoint({"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"})


def closed_form(steps: int, nesterov: bool = True, lr: float = 0.03) -> dict[str, Tensor]:
    found = {name: parameter.detach().clone() for name, parameter in new_model().named_parameters() if name in MATRICES}
    for name, weight in found.items():
        mean = torch.zeros_like(weight)
        for step in range(steps):
            gradient = gradients(step)[name]
            mean = 0.8 * mean + 0.2 * gradient
            direction = 0.8 * mean + 0.2 * gradient if nesterov else mean
            stack = direction if direction.ndim == 3 else direction[None]
            update = torch.stack([by_svd(matrix) for matrix in stack]).view_as(weight)
            weight.mul_(1 - lr * 0.2).sub_(update, alpha=lr * 0.2 * math.sqrt(max(weight.shape[-2:])))
    return found


def train(layout: str, steps: int = 3, **options) -> dict[str, Tensor]:
    model = laid_out(layout)
    optimizer = build_optimizer(model, **{**OPTIONS, **options})
    assert isinstance(optimizer, MultiOptimizer)
    for step in range(steps):
        give_gradients(model, step)
        optimizer.step()
    return values(model)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-12) -> None:
    assert found.keys() >= expected.keys()
    for name, truth in expected.items():
        assert (found[name] - truth).norm() <= bound * truth.norm(), name


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_follow_the_formula(nesterov):
    found = train("single", nesterov=nesterov)
    assert_equal(found, closed_form(3, nesterov), 1e-10)  # the decomposition has its own rounding


def test_matrices_can_have_a_rate_of_their_own():
    assert_equal(train("single", matrix_lr=0.01), closed_form(3, lr=0.01), 1e-10)


def slices(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix by itself: PyTorch's own Muon takes no stacks."""
    return {
        f"{name}.{index}": matrix
        for name in MATRICES
        for index, matrix in enumerate(tensors[name].detach().view(-1, *tensors[name].shape[-2:]))
    }


def test_single_precision_takes_the_steps_of_pytorchs_own_muon():
    model = new_model(torch.float32)
    theirs = {name: nn.Parameter(matrix.clone()) for name, matrix in slices(dict(model.named_parameters())).items()}
    ours = Muon(hidden_matrices(model), lr=0.03, weight_decay=0.2, momentum=0.8)
    reference = torch.optim.Muon(
        theirs.values(), lr=0.03, weight_decay=0.2, momentum=0.8, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        give_gradients(model, step)
        ours.step()
        for name, gradient in slices(gradients(step, torch.float32)).items():
            theirs[name].grad = gradient
        reference.step()
    for name, matrix in slices(dict(model.named_parameters())).items():
        assert torch.equal(matrix, theirs[name]), name


@pytest.fixture(scope="module")
def truth():
    return train("single")


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "single"])
def test_every_layout_takes_the_same_steps(layout, truth):
    for found in run_ranks(train, LAYOUTS[layout], layout):
        assert_equal(found, truth)


def in_small_rounds(layout: str) -> tuple[dict[str, Tensor], int]:
    matrix_owners._ROUND_ELEMENTS = 10
    with Traffic() as traffic:
        found = train(layout)
    return found, traffic.calls["c10d.alltoall_base_.default"]


@pytest.mark.parametrize("layout", ["fsdp2_4", "ep2_fsdp2", "hsdp"])
def test_rounds_change_nothing(layout, truth):
    for found, exchanges in run_ranks(in_small_rounds, LAYOUTS[layout], layout):
        assert_equal(found, truth)
        assert exchanges > 3 * 2 * 1  # steps, ways, rounds


def twice(layout: str) -> bool:
    first, second = train(layout), train(layout)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_it_repeats_bit_for_bit():
    assert all(run_ranks(twice, 4, "hsdp_ep2"))


def without_gradients(layout: str, missing: dict[int, tuple[str, ...]]) -> dict[str, Tensor]:
    model = laid_out(layout)
    optimizer = build_optimizer(model, **OPTIONS)
    for step in range(3):
        give_gradients(model, step, missing.get(dist.get_rank() if dist.is_initialized() else 0, ()))
        optimizer.step()
    return values(model)


@pytest.mark.parametrize("layout", ["fsdp2_2", "ep2"])
def test_a_matrix_without_a_gradient_anywhere_is_left_alone(layout, truth):
    name = "layers.0.wide.weight"
    for found in run_ranks(without_gradients, 2, layout, {0: (name,), 1: (name,)}):
        assert torch.equal(found[name], new_model().get_parameter(name).detach())
        assert_equal(found, {other: value for other, value in truth.items() if other != name})


def zeroed(name: str, part: slice) -> dict[str, Tensor]:
    """One process, with zeros for a part of a gradient."""
    model = new_model()
    optimizer = build_optimizer(model, **OPTIONS)
    for step in range(3):
        give_gradients(model, step)
        model.get_parameter(name).grad[part] = 0
        optimizer.step()
    return values(model)


@pytest.mark.parametrize(
    ("layout", "name", "part"),
    [("fsdp2_2", "layers.0.tall.weight", slice(3, 6)), ("ep2", "layers.1.experts.up_proj", slice(2, 4))],
)
def test_a_rank_without_a_gradient_takes_part_with_zeros(layout, name, part):
    expected = zeroed(name, part)
    for found in run_ranks(without_gradients, 2, layout, {1: (name,)}):
        assert_equal(found, {name: expected[name]})


class Traffic(TorchDispatchMode):
    """Counts what a rank receives in collectives, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            received = args[0][0] if isinstance(args[0], list) else args[0]
            self.calls[str(func)] += 1
            self.elements[str(func)] += received.numel()
        return func(*args, **(kwargs or {}))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 64, bias=False) for _ in range(12)])


def received(layout: str) -> dict[str, int]:
    torch.manual_seed(0)
    model = Wide()
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=dense_mesh(layout))
    optimizer = Muon(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Traffic() as traffic:
        optimizer.step()
    return dict(traffic.elements)


@pytest.mark.parametrize(("layout", "shards"), [("fsdp2_2", 2), ("fsdp2_4", 4), ("hsdp", 2)])
def test_no_rank_receives_all_matrices(layout, shards):
    everything, ranks = 12 * 32 * 64, LAYOUTS[layout]
    copies = ranks // shards
    for elements in run_ranks(received, ranks, layout):
        flags = elements.pop("c10d.allreduce_.default")
        assert flags <= 12 * 2
        # Out: the matrices it owns. Back: its shards of those that its replica's ranks own.
        assert elements.pop("c10d.alltoall_base_.default") == 2 * everything // ranks
        # Its shards of all, once from each replica: nothing where there is one.
        assert elements.pop("c10d.broadcast_.default", 0) == (everything // shards if copies > 1 else 0)
        assert not elements


@pytest.mark.parametrize("order", [1, -1])
def test_dear_matrices_are_shared_out_first(order):
    """One that costs as much as eight others has an owner for itself."""
    shapes = [(32, 64)] + [(16, 32)] * 9
    matrices = [Matrix(index, None, shape, 0) for index, shape in enumerate(shapes)][::order]
    ((owned,),) = matrix_owners._share_out(matrices, 1, 4)
    assert sorted(sorted(matrix.shape for matrix in own) for own in owned) == [[(16, 32)] * 3] * 3 + [[(32, 64)]]


def on_fsdp1() -> None:
    build_optimizer(fsdp1_with_experts(new_model(), dense_mesh("fsdp2_2")), **OPTIONS)


def test_fsdp1_is_rejected_with_the_fix():
    with pytest.raises(RankFailed, match=r"(?s)FSDP1 keeps flat pieces.*fix: use FSDP2"):
        run_ranks(on_fsdp1, 2)


def test_what_is_no_matrix_is_rejected():
    with pytest.raises(ModelError, match=r"the shape \[3\]"):
        Muon([nn.Parameter(torch.ones(3))])
    with pytest.raises(ModelError, match="no matrix to train"):
        build_optimizer(nn.Linear(3, 3), **OPTIONS)
    with pytest.raises(ModelError, match="frozen"):
        build_optimizer(Model().requires_grad_(False), **OPTIONS)


def on_two_meshes() -> None:
    Muon(hidden_matrices(laid_out("ep2")))


def strided() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]))
    parameter.grad = torch.ones_like(parameter)
    Muon([parameter]).step()


def test_what_cannot_be_gathered_is_rejected():
    with pytest.raises(RankFailed, match="one optimizer for each mesh"):
        run_ranks(on_two_meshes, 2)
    with pytest.raises(RankFailed, match="sharded over several axes"):
        run_ranks(strided, 4)
