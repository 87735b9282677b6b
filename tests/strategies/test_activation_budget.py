"""What is kept for the backward, counted; and what a budget of activations chooses."""

from __future__ import annotations

import logging
import re
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel

from tests.models.tiny import tiny_config
from veomni.errors import ConfigError, LayoutError
from veomni.launcher import Launcher
from veomni.metrics.activation_memory import ActivationMemory
from veomni.models import build_model, derive_plan
from veomni.ops.host_stack import IN_FLIGHT
from veomni.strategies import FSDP2, ActivationBudget, ActivationCheckpointing, ExpertParallel, Single, TiledMLP
from veomni.strategies.select import select_strategies
from veomni.strategies.transforms.activation_budget import choose
from veomni.testing.ranks import run_ranks

TOKENS, LAYERS, HIDDEN, INNER = 64, 6, 32, 480


def config():
    return tiny_config("llama", num_hidden_layers=LAYERS, intermediate_size=INNER)


class Alive(TorchDispatchMode):
    """Counts the storages of tensors by shape, from when an operation makes them until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[weakref.ref[torch.UntypedStorage], tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self._made.setdefault(id(storage), (weakref.ref(storage), tuple(each.shape)))
                if self._made[id(storage)][0]() is not storage:
                    self._made[id(storage)] = weakref.ref(storage), tuple(each.shape)
        return result

    def count(self, shape: tuple[int, ...]) -> int:
        return sum(made() is not None and found == shape for made, found in self._made.values())


def set_up(strategies):
    launcher = Launcher([Single(), *strategies], accelerator="cpu", backend="gloo", precision="fp32")
    launcher.launch()
    return launcher, launcher.setup_model(build_model(config(), weights="random")).train()


def kept(strategies):
    """How many block inputs and tensors inside MLPs a forward leaves, how many the backward; and all gradients."""
    launcher, model = set_up(strategies)
    rows = torch.arange(TOKENS)[None] % 100
    with Alive() as alive:
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
    inputs = alive.count((1, TOKENS, HIDDEN))
    inner = alive.count((1, TOKENS, INNER)) + alive.count((TOKENS, INNER))
    loss.backward()
    left = alive.count((1, TOKENS, HIDDEN)) + alive.count((TOKENS, INNER))
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    launcher.close()
    return inputs, inner, left, gradients


def kept_by_each():
    return [
        kept(strategies)
        for strategies in ([ActivationCheckpointing()], [ActivationCheckpointing(offload=True)], [TiledMLP(16)], [])
    ]


def test_what_a_forward_keeps_on_the_device():
    ((full, offloaded, tiled, plain),) = run_ranks(kept_by_each, 1, init=False)
    assert full[0] - offloaded[0] == LAYERS - IN_FLIGHT
    assert full[1] == offloaded[1] == tiled[1] == 0
    assert plain[1] >= 3 * LAYERS
    assert all(left <= 1 for _, _, left, _ in (full, offloaded, tiled, plain))
    assert torch.equal(full[3], offloaded[3])


def sizes(of=None, **options) -> ActivationMemory:
    model = build_model(of or config(), weights="random")
    return ActivationMemory.of(model, derive_plan(model), 4, **options)


class Tiles(TorchDispatchMode):
    """Counts the modules that run in tiles."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.veomni.tiles.default
        return func(*args, **(kwargs or {}))


def shared_experts_in_tiles(memory: str) -> int:
    strategies = [FSDP2(), ExpertParallel(2), ActivationBudget(memory, 1 << 20)]
    launcher = Launcher(strategies, accelerator="cpu", backend="gloo", precision="fp32")
    launcher.launch()
    model = launcher.setup_model(build_model(tiny_config("qwen2_moe"), weights="random")).train()
    rows = torch.arange(TOKENS)[None] % 100
    with Tiles() as tiles:
        model(input_ids=rows, labels=rows, use_cache=False)
    launcher.close()
    return tiles.count


def test_shared_experts_that_run_ahead_are_in_the_tiles_that_a_budget_chose():
    tiny = sizes(tiny_config("qwen2_moe"), expert_ranks=2)
    memory = f"{tiny.bytes(1 << 20, tiny.policies[-1]) / 2**20 + 1:.0f} MiB"
    assert run_ranks(shared_experts_in_tiles, 2, memory, init=False) == [2, 2]


def chosen(budgets):
    """The line in the log for each budget of activations of a million tokens."""
    said: list[str] = []
    logging.getLogger("veomni.strategies.transforms.activation_budget").addFilter(
        lambda record: bool(said.append(record.getMessage())) or True
    )
    for memory in budgets:
        set_up([ActivationBudget(memory, 1 << 20)])[0].close()
    return said


def test_a_budget_chooses_the_cheapest_that_fits():
    policies = sizes().policies
    (said,) = run_ranks(
        chosen, 1, [f"{sizes().bytes(1 << 20, policy) / 2**20 + 1:.0f} MiB" for policy in policies], init=False
    )
    assert [line.partition(";")[0] for line in said] == [f"activations: {policy}" for policy in policies]
    assert len(policies) == 5


def test_a_budget_that_nothing_fits_names_what_does():
    with pytest.raises(ConfigError, match=r"take at least \d+ MiB \(full \+ offload") as caught:
        choose(sizes(), "1 GiB", 1 << 20)
    (fits,) = re.findall(r"a rank at most (\d+) tokens", caught.value.fix)
    smallest = sizes().policies[-1]
    assert sizes().bytes(int(fits), smallest) <= 2**30 < sizes().bytes(int(fits) + 1024, smallest)


@pytest.mark.parametrize(
    ("other", "problem"), [(ActivationCheckpointing, "activation_checkpointing and"), (TiledMLP, "tiled_mlp is given")]
)
def test_one_strategy_decides_what_is_recomputed_and_tiled(other, problem):
    with pytest.raises(LayoutError, match=problem):
        select_strategies([Single(), other(), ActivationBudget("1 GiB", 8)])


@pytest.mark.parametrize("name", ["gpt2", "bloom", "vit", "t5"])
def test_what_is_not_counted_is_an_input_error(name):
    sizes = {"hidden_size": 32, "n_embd": 32, "d_model": 32, "num_attention_heads": 4}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(name, **sizes))
    with pytest.raises(ConfigError, match="are not counted"):
        ActivationMemory.of(model, derive_plan(model), 4)


@pytest.mark.parametrize("memory", ["1 GB", "lots", "GiB"])
def test_a_budget_has_a_unit(memory):
    with pytest.raises(ConfigError, match="memory"):
        ActivationBudget(memory, 8)
