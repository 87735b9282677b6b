"""Ulysses beside the parameter strategies: what it refuses, what it checks, and rows that do not divide."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.models.tiny import tiny_config
from tests.parity.layouts import beside
from veomni.batch.forward_call import ForwardCall, SequenceGroups, forward_call
from veomni.batch.split import SequenceShard
from veomni.errors import ConfigError, DataError, LayoutError, ModelError
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.ops.attention.ulysses import UlyssesAttention
from veomni.ops.attention.whole_rows import SEQUENCE_GROUPS
from veomni.strategies import DDP, FSDP2, ContextParallel, Ulysses
from veomni.testing.documents import global_rows, pack
from veomni.testing.ranks import RankFailed, run_ranks


def launched(strategies, **options) -> Launcher:
    launcher = Launcher(strategies, accelerator="cpu", backend="gloo", timeout_seconds=60, **options)
    launcher.launch()
    return launcher


def set_up(model_name: str, size: int, attention: str = "auto") -> None:
    launcher = launched([DDP(), Ulysses(size)])
    launcher.setup_model(build_model(tiny_config(model_name), weights="random", attention=attention))


def refusal(function, ranks: int, *args, **kwargs) -> BaseException:
    with pytest.raises(RankFailed) as caught:
        run_ranks(function, ranks, *args, init=False, **kwargs)
    return caught.value.exceptions[0]


def two_attention_heads() -> None:
    launcher = launched([DDP(), Ulysses(4)])
    launcher.setup_model(build_model(tiny_config("llama", num_attention_heads=2), weights="random"))


def test_heads_that_do_not_divide_are_rejected():
    error = refusal(two_attention_heads, 4)
    assert isinstance(error, ModelError)
    assert "2 attention heads cannot be shared by 4 ranks (Ulysses.size)" in str(error)
    assert "use one of 1, 2" in str(error)


def test_a_world_it_does_not_divide_is_rejected_before_any_process_group():
    error = refusal(set_up, 3, "llama", 2)
    assert isinstance(error, LayoutError)
    assert "ulysses 2" in str(error)


def test_a_size_below_one_is_rejected():
    with pytest.raises(ConfigError, match=r"Ulysses\.size is 0"):
        Ulysses(0)


@pytest.mark.parametrize(("model", "named"), [("qwen3_next", "linear_attn"), ("t5", "takes no position_ids")])
def test_models_that_cannot_be_split_are_rejected_with_what_stands_in_the_way(model, named):
    error = refusal(set_up, 2, model, 2)
    assert isinstance(error, ModelError)
    assert named in str(error)


def on_a_ring(model_name: str, **changes) -> None:
    launcher = launched([DDP(), ContextParallel(2)])
    launcher.setup_model(build_model(tiny_config(model_name, **changes), weights="random"))


def test_sinks_are_rejected_on_a_ring():
    error = refusal(on_a_ring, 2, "gpt_oss")
    assert isinstance(error, ModelError)
    assert "s_aux" in str(error)
    assert error.fix == "use Ulysses instead of ContextParallel"


def test_a_ring_needs_no_heads_that_divide():
    run_ranks(on_a_ring, 2, "llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=24, init=False)


def test_a_ring_of_no_ranks_is_rejected():
    with pytest.raises(ConfigError, match=r"ContextParallel\.size is 0"):
        ContextParallel(0)


class Mixing(nn.Module):
    """What a layer may hide: every position also gets a little of the one before it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden + 0.1 * torch.roll(hidden, 1, dims=1))


def mixing_outside_attention() -> None:
    launcher = launched([DDP(), Ulysses(2)])
    model = build_model(tiny_config("llama"), weights="random")
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    launcher.setup_model(model)


def test_mixing_that_no_name_gives_away_is_found_by_the_probe():
    error = refusal(mixing_outside_attention, 2)
    assert isinstance(error, ModelError)
    assert "see each other outside attention" in str(error)


def counting_its_own_positions() -> None:
    launcher = launched([DDP(), Ulysses(2)])
    model = build_model(tiny_config("llama"), weights="random")
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None])
    launcher.setup_model(model)


def test_positions_that_the_model_counts_by_itself_are_found_by_the_probe():
    error = refusal(counting_its_own_positions, 2)
    assert isinstance(error, ModelError)
    assert "position_ids" in str(error)


def plain_module() -> None:
    launched([DDP(), Ulysses(2)]).setup_model(nn.Linear(2, 2))


def test_a_module_that_is_no_transformers_model_is_rejected():
    error = refusal(plain_module, 2)
    assert isinstance(error, ModelError)
    assert "Linear is not a transformers model" in str(error)


def unknown_backend() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("linearised", lambda *args, **kwargs: None)
    AttentionMaskInterface.register("linearised", lambda *args, **kwargs: None)
    launcher = launched([DDP(), Ulysses(2)])
    model = build_model(tiny_config("llama"), weights="random")
    model.set_attn_implementation("linearised")
    launcher.setup_model(model)


def test_an_attention_that_cannot_take_document_borders_is_rejected():
    error = refusal(unknown_backend, 2)
    assert isinstance(error, ModelError)
    assert "linearised" in str(error)
    assert "cu_seqlens" in str(error)


def backend_that_asks_who_it_is() -> str:
    from transformers import AttentionInterface

    def attend(module, query, key, value, attention_mask, **kwargs):
        assert module.config.hidden_size == 32
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)[0], asked.append(
            module.config._attn_implementation
        )

    asked: list[str] = []
    AttentionInterface.register("flash_attention_2", attend)
    module = build_model(tiny_config("llama"), weights="random").model.layers[0].self_attn
    heads = [torch.randn(1, number, 6, 8) for number in (4, 2, 2)]
    groups = SequenceGroups(SequenceShard(dist.get_world_size()), dist.group.WORLD, ulysses=dist.group.WORLD)
    setattr(module, SEQUENCE_GROUPS, groups)
    with forward_call(ForwardCall(sequence=groups)):
        UlyssesAttention("flash_attention_2")(module, *heads, None)
    return asked[-1]


def test_a_backend_finds_its_own_name_in_the_configuration():
    """transformers' flash attention looks there for the package to call."""
    assert run_ranks(backend_that_asks_who_it_is, 2) == ["flash_attention_2"] * 2


def called_with_copies() -> None:
    launcher = launched([DDP(), Ulysses(2)])
    model = launcher.setup_model(build_model(tiny_config("llama"), weights="random"))
    (micro,) = launcher.accumulate(model, next(launcher.track([[pack(global_rows(128)[:1])]])))
    one = {**micro.inputs, "input_ids": micro.inputs["input_ids"].clone()}
    assert torch.equal(model(**one).loss, model(**micro.inputs).loss)
    with pytest.raises(ModelError, match="shares rows with other ranks, and was called with copies"):
        model(**{name: value.clone() for name, value in micro.inputs.items() if isinstance(value, torch.Tensor)})


def test_copies_that_lost_the_layout_of_the_whole_rows_are_an_error():
    run_ranks(called_with_copies, 2, init=False)


def different_rows(check: bool) -> None:
    launcher = launched([DDP(), Ulysses(2, validate_batches=check)])
    model = launcher.setup_model(build_model(tiny_config("llama"), weights="random"))
    rows = global_rows(128)
    wrong = [[pack(rows[launcher.rank : launcher.rank + 1])]]  # as a loader that takes ranks for data ranks gives them
    for batch in launcher.track(wrong):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)


def test_ranks_of_a_group_that_read_different_rows_are_caught_in_debug_mode():
    error = refusal(different_rows, 2, True)
    assert isinstance(error, DataError)
    assert "different rows" in str(error)


def evaluated(strategies, rows) -> float:
    launcher = launched(strategies, precision="fp64")
    model = launcher.setup_model(build_model(tiny_config("llama"), weights="random"))
    loss = launcher.evaluate(model, [[pack(rows[launcher.data_parallel.rank :: launcher.data_parallel.size])]])
    launcher.close()
    return loss["eval_loss"]


def test_evaluation_counts_every_token_once():
    rows = global_rows(128)[:4]
    (expected,) = run_ranks(evaluated, 1, [FSDP2()], rows, init=False)
    for found in run_ranks(evaluated, 4, [FSDP2(), Ulysses(2)], rows, init=False):
        assert found == pytest.approx(expected, rel=1e-13)


def gradients_of(strategies, length: int, compile: str = ""):
    """One row of ``length`` tokens in two documents, and one that is a single document."""
    from veomni.testing.step import full_gradients

    launcher = launched(beside(strategies, compile=compile), precision="fp32" if compile else "fp64")
    model = launcher.setup_model(build_model(tiny_config("qwen3"), weights="random"))
    ids = torch.randint(1, 128, (2, length), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(length - 5)]), torch.arange(length)])
    labels = torch.where(positions == 0, -100, ids)
    labels[0, 5:] = -100  # at four ranks, parts of row 0 have no label at all
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    for step in launcher.track([[batch]]):
        for micro in launcher.accumulate(model, step):
            launcher.backward(model(**micro.inputs).loss, micro)
        found = full_gradients(model), launcher.global_loss(step).item()
    launcher.close()
    return found


@pytest.mark.parametrize("length", [17, 22, 24])
@pytest.mark.parametrize("split", [Ulysses, ContextParallel])
@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_that_do_not_divide_are_padded_and_exact(length, ranks, split):
    ((expected, loss),) = run_ranks(gradients_of, 1, [FSDP2()], length, init=False)
    for found, found_loss in run_ranks(gradients_of, ranks, [FSDP2(), split(ranks)], length, init=False):
        assert found_loss == pytest.approx(loss, rel=1e-13)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


def test_compiled_blocks_give_the_same():
    ((expected, _),) = run_ranks(gradients_of, 1, [FSDP2()], 24, init=False, compile="inductor")
    for found, _ in run_ranks(gradients_of, 2, [FSDP2(), Ulysses(2)], 24, init=False, compile="inductor", timeout=300):
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
