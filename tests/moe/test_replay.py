"""Recorded choices are those of the routers; replayed, they are made again, and gradients follow from them."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.models.tiny import tiny_config
from tests.moe.steps import ALL_LAYOUTS, packed
from tests.parity.layouts import beside, vocabulary
from veomni.errors import DataError, ModelError
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.moe import MoEOptions, RoutingLog, find_routers, record_routing, replay_routing
from veomni.strategies.transforms.float64 import Float64Throughout
from veomni.testing.documents import ROW, global_rows
from veomni.testing.oracle import initial_model, relative_error
from veomni.testing.ranks import run_ranks
from veomni.testing.step import full_gradients

MODELS = ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"]


def rows(model_name):
    return global_rows(vocabulary(model_name))[4:8]


def strange_log(model_name: str) -> RoutingLog:
    """Choices no router would make: two different experts for every token of the four rows, at random."""
    routers = find_routers(build_model(tiny_config(model_name), weights="random")).readable
    draw = torch.Generator().manual_seed(5)
    choice = {router.name: torch.rand(4 * ROW, 4, generator=draw).topk(2).indices.to(torch.int16) for router in routers}
    return RoutingLog([choice])


def share_of(log: RoutingLog, rank: int, size: int, accumulation: int) -> RoutingLog:
    """What a data rank has to replay: its rows, in so many micro-batches."""
    (whole,) = log.forwards
    mine = list(range(4))[rank::size]
    count = len(mine) // accumulation
    parts = [mine[start : start + count] for start in range(0, len(mine), count)]
    return RoutingLog(
        [{name: sent.unflatten(0, (4, ROW))[part].flatten(0, 1) for name, sent in whole.items()} for part in parts]
    )


@functools.cache
def truth(model_name: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and gradients of a plain model whose ``topk`` returns the strange choices, whatever it is asked."""
    log = strange_log(model_name).forwards[0]
    model = initial_model(tiny_config(model_name), "cpu")
    topk, waiting = torch.topk, iter(log.values())
    batch = packed(rows(model_name))
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}

    def recorded(values, k, dim=-1, **kwargs):
        if k != 2 or values.shape[-1] != 4:  # a choice among groups
            return topk(values, k, dim=dim, **kwargs)
        indices = next(waiting).long()
        return torch.return_types.topk((values.gather(-1, indices), indices))

    torch.topk = recorded
    try:
        with Float64Throughout():
            loss = model(**inputs, use_cache=False).loss
    finally:
        torch.topk = topk
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def replayed_step(model_name, layout, *, recompute="none", accumulation=1, options=None):
    launcher = Launcher(
        beside(ALL_LAYOUTS[layout][1](), recompute=recompute), accelerator="cpu", backend="gloo", precision="fp64",
        timeout_seconds=60,
    )  # fmt: skip
    launcher.launch()
    model = launcher.setup_model(build_model(tiny_config(model_name), weights="random"), router=options).train()
    place = launcher.data_parallel
    mine = rows(model_name)[place.rank :: place.size]
    count = len(mine) // accumulation
    loader = [[packed(mine[start : start + count]) for start in range(0, len(mine), count)]]
    log = share_of(strange_log(model_name), place.rank, place.size, accumulation)
    log = log.shard(launcher.sequence_shard, [count] * accumulation)
    with replay_routing(model, log), record_routing(model) as again:
        for batch in launcher.track(loader):
            for micro in launcher.accumulate(model, batch):
                launcher.backward(model(**micro.inputs).loss, micro)
            loss = launcher.global_loss(batch).item()
    gradients = full_gradients(model)
    launcher.close()
    for chosen, expected in zip(again.forwards, log.forwards, strict=True):
        assert all(torch.equal(chosen[name], expected[name]) for name in expected)
    return loss, gradients


def agrees(loss, gradients, expected):
    assert loss == pytest.approx(expected[0], rel=1e-12)
    assert gradients.keys() == expected[1].keys()
    wrong = {name: error for name in gradients if (error := relative_error(gradients[name], expected[1][name])) > 1e-12}
    assert not wrong


@pytest.mark.parametrize("model", MODELS)
def test_the_experts_that_were_told_are_weighed_by_the_models_own_rule(model):
    expected = truth(model)
    agrees(*run_ranks(replayed_step, 1, model, "single", init=False)[0], expected)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("single", {"recompute": "full", "accumulation": 2}),
        ("fsdp2_2", {"recompute": "full"}),
        ("fsdp1_full", {"recompute": "selective", "accumulation": 2}),
        ("ulysses2_ddp", {"accumulation": 2}),
        ("ulysses2_fsdp2_2", {"recompute": "full"}),
        ("ring2_fsdp1", {}),
        ("ep2_fsdp2_4", {"recompute": "full"}),
    ],
)
def test_layouts(layout, options):
    expected = truth("qwen3_moe")
    for outcome in run_ranks(replayed_step, ALL_LAYOUTS[layout][0], "qwen3_moe", layout, init=False, **options):
        agrees(*outcome, expected)


def build_on_cpu(config):
    return initial_model(config, "cpu").float()


def test_what_is_recorded_is_what_the_routers_return(tmp_path):
    model = build_on_cpu(tiny_config("qwen3_moe"))
    expected = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda module, args, output: expected.append(output[2]))
    tokens = torch.arange(24).view(2, 12)
    with record_routing(model) as log, torch.no_grad():
        model(input_ids=tokens)
        model(input_ids=tokens + 7)
    assert [list(forward) for forward in log.forwards] == [["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]] * 2
    found = [indices for forward in log.forwards for indices in forward.values()]
    assert all(torch.equal(a.long(), b) for a, b in zip(found, expected, strict=True))
    log.save(tmp_path / "routing.safetensors")
    again = RoutingLog.load(tmp_path / "routing.safetensors")
    assert len(again.forwards) == 2
    for read, made in zip(again.forwards, log.forwards, strict=True):
        assert read.keys() == made.keys()
        assert all(torch.equal(read[name], made[name]) for name in made)
    model(input_ids=tokens)
    assert len(log.forwards) == 2, "recording ends with its context"


def test_a_changed_router_keeps_the_recorded_experts():
    model = build_on_cpu(tiny_config("qwen3_moe"))
    tokens = torch.arange(24).view(2, 12)
    with record_routing(model) as log, torch.no_grad():
        before = model(input_ids=tokens).logits
    with replay_routing(model, log), torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, before)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data.neg_()
    with replay_routing(model, log), record_routing(model) as replayed:
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(torch.equal(replayed.forwards[0][name], log.forwards[0][name]) for name in log.forwards[0])
    with record_routing(model) as free:
        model(input_ids=tokens)
    assert any(not torch.equal(free.forwards[0][name], log.forwards[0][name]) for name in log.forwards[0])
    assert all(p.grad.norm() > 0 for name, p in model.named_parameters() if name.endswith("gate.weight"))


def test_balance_and_replay_together():
    """The load of the step is that of the replayed choice, and the router gets both gradients."""
    plain = run_ranks(replayed_step, 1, "qwen3_moe", "single", init=False)[0]
    both = run_ranks(
        replayed_step, 1, "qwen3_moe", "single", init=False, options=MoEOptions(aux_loss_coef=1.0), recompute="full"
    )[0]
    assert both[0] == pytest.approx(plain[0], rel=1e-12)
    gate = "model.layers.0.mlp.gate.weight"
    assert relative_error(both[1][gate], plain[1][gate]) > 1e-3


def shorter(log):
    log.forwards[0] = {name: indices[:-1] for name, indices in log.forwards[0].items()}


def without_a_router(log):
    log.forwards[0].popitem()


def too_many_experts(log):
    log.forwards[0]["model.layers.1.mlp.gate"][5, 1] = 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (shorter, r"model.layers.0.mlp.gate is \[159, 2\] and the forward makes one of \[160, 2\]"),
        (without_a_router, "model.layers.1.mlp.gate"),
        (too_many_experts, "experts up to 4, and there are 4"),
    ],
)
def test_a_log_that_does_not_fit_is_rejected(change, says):
    model = build_on_cpu(tiny_config("qwen3_moe"))
    log = strange_log("qwen3_moe")
    change(log)
    with pytest.raises(DataError, match=says), replay_routing(model, log):
        model(input_ids=torch.zeros(4, ROW, dtype=torch.int64))


def test_more_forwards_than_were_recorded_are_rejected():
    model = build_on_cpu(tiny_config("qwen3_moe"))
    with replay_routing(model, strange_log("qwen3_moe")), torch.no_grad():
        model(input_ids=torch.zeros(4, ROW, dtype=torch.int64))
        with pytest.raises(DataError, match="holds 1 forwards"):
            model(input_ids=torch.zeros(4, ROW, dtype=torch.int64))


def test_recomputing_one_of_two_forwards_is_rejected():
    model = build_on_cpu(tiny_config("qwen3_moe")).train()
    model.gradient_checkpointing_enable()
    log = strange_log("qwen3_moe")
    log.forwards *= 2
    tokens = torch.zeros(4, ROW, dtype=torch.int64)
    with replay_routing(model, log):
        first = model(input_ids=tokens, labels=tokens).loss
        second = model(input_ids=tokens, labels=tokens).loss
        with pytest.raises(DataError, match="2 forwards were replayed before the first backward"):
            (first + second).backward()


def test_a_file_that_is_no_log_is_rejected(tmp_path):
    (tmp_path / "routing").write_bytes(b"not safetensors")
    with pytest.raises(DataError, match="no recorded routing"):
        RoutingLog.load(tmp_path / "routing")


def test_dense_models_are_rejected():
    with pytest.raises(ModelError, match="LlamaForCausalLM"), record_routing(build_on_cpu(tiny_config("llama"))):
        pass
