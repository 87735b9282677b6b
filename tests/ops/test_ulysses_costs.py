"""What Ulysses sends and keeps, counted: bytes through the dispatcher, activations through saved-tensor hooks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.tiny import tiny_config
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import DDP, ActivationCheckpointing, Strategy, Ulysses
from veomni.testing.ranks import run_ranks

SEQ, HIDDEN, LAYERS, HEADS = 512, 64, 2, 4
EQUAL_HEADS = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HIDDEN // HEADS,
    "intermediate_size": 2 * HIDDEN,
    "max_position_embeddings": SEQ,
}


class SentBytes(TorchDispatchMode):
    """Adds up what every collective on tensors sends, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace != "c10d", func
        if func is torch.ops.veomni.exchange_evenly.default:
            sent = args[0]
            self.by_operation[str(func)] += sent.numel() * sent.element_size()
        return func(*args, **(kwargs or {}))


def model_on(ranks: int, *others: Strategy):
    launcher = Launcher([DDP(), Ulysses(ranks), *others], accelerator="cpu", backend="gloo", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(build_model(tiny_config("llama", **EQUAL_HEADS), weights="random"))
    ids = torch.randint(1, 128, (1, SEQ), generator=torch.Generator().manual_seed(0))
    return launcher, model, next(iter(launcher.track([[{"input_ids": ids, "labels": ids}] * 2])))


def bytes_sent(ranks: int, *others: Strategy) -> dict[str, float]:
    """Bytes a rank sends to others per layer in the forward, and in the backward."""
    launcher, model, batch = model_on(ranks, *others)
    found = {}
    for micro in launcher.accumulate(model, batch):
        if micro.last:  # gradients are exchanged in it as well
            break
        with SentBytes() as forward:
            loss = model(**micro.inputs).loss
        with SentBytes() as backward:
            loss.backward()
        for name, mode in (("forward", forward), ("backward", backward)):
            found[name] = sum(mode.by_operation.values()) * (ranks - 1) / ranks / LAYERS
    launcher.close()
    return found


@pytest.mark.parametrize(("ranks", "others"), [(2, []), (4, []), (2, [ActivationCheckpointing("selective")])])
def test_bytes_per_layer_are_those_of_four_exchanges(ranks, others):
    """A selective recomputation exchanges nothing again."""
    ideal = 4 * SEQ * HIDDEN * (ranks - 1) / ranks**2 * 4  # elements of 4 bytes
    for found in run_ranks(bytes_sent, ranks, ranks, *others, init=False):
        assert found["forward"] == pytest.approx(ideal, rel=0.02)
        assert found["backward"] == pytest.approx(ideal, rel=0.02)


def saved_bytes(ranks: int) -> int:
    """Bytes of activations that the forward keeps for the backward."""
    launcher, model, batch = model_on(ranks)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for micro in launcher.accumulate(model, batch):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**micro.inputs)
        break
    launcher.close()
    return sum(kept.values())


@pytest.mark.parametrize("ranks", [2, 4])
def test_activations_fall_with_the_number_of_ranks(ranks):
    (whole,) = run_ranks(saved_bytes, 1, 1, init=False)
    for found in run_ranks(saved_bytes, ranks, ranks, init=False):
        assert found == pytest.approx(whole / ranks, rel=0.1)
