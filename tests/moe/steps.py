"""One step with balanced routers on a layout, and the truth: transformers' own loss in one fp64 process."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.tiny import tiny_config
from tests.parity.layouts import EXPERT_LAYOUTS, LAYOUTS, beside, vocabulary
from veomni.batch.documents import RowLayout
from veomni.batch.micro_batch import MicroBatch
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.models.adapter.adapter import ModelAdapter
from veomni.moe import MoEOptions
from veomni.strategies.transforms.float64 import Float64Throughout
from veomni.testing.documents import IGNORE, Document, global_rows, pack, supervised
from veomni.testing.oracle import Truth, initial_model
from veomni.testing.step import Outcome, full_gradients

AUX, Z = 0.3, 0.02
ALL_LAYOUTS = {**LAYOUTS, **EXPERT_LAYOUTS}


class Float64Zeros(TorchDispatchMode):
    """transformers sums its loss from zeros in float32, and divides what it counted in that."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.zeros.default and kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def packed(rows: list[list[Document]]) -> MicroBatch:
    lengths = [[len(document.tokens) for document in documents] for documents in rows]
    layout = RowLayout(tuple(length for row in lengths for length in row), tuple(map(sum, lengths)))
    return MicroBatch.of_fields(pack(rows), layout)


def micro_batches(rows: list[list[Document]], rank: int, size: int, accumulation: int) -> list[MicroBatch]:
    mine = rows[rank::size]
    per_micro = len(mine) // accumulation
    return [packed(mine[start : start + per_micro]) for start in range(0, len(mine), per_micro)]


def balanced_step(
    model_name: str,
    layout: str,
    options: MoEOptions,
    *,
    precision: str = "fp64",
    accumulation: int = 1,
    recompute: str = "none",
    compile: str = "",
    mutate: Callable[[Launcher, Any], None] | None = None,
    **changes: Any,
) -> tuple[Outcome, dict[str, float], dict[str, list[int]]]:
    """Gradients, metrics and the tokens of every expert; ``mutate`` breaks something on purpose."""
    launcher = Launcher(
        beside(ALL_LAYOUTS[layout][1](), recompute=recompute, compile=compile), accelerator="cpu", backend="gloo",
        precision=precision, timeout_seconds=60,
    )  # fmt: skip
    launcher.launch()
    config = tiny_config(model_name, **changes)
    model = launcher.setup_model(build_model(config, weights="random"), router=options).train()
    if mutate is not None:
        mutate(launcher, model)
    place = launcher.data_parallel
    loader = [micro_batches(global_rows(vocabulary(model_name)), place.rank, place.size, accumulation)]
    for batch in launcher.track(loader):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        loss = launcher.global_loss(batch).item()
        gradients = full_gradients(model)
        norm = launcher.clip_grad_norm(model, 1e9).item()
    controller = ModelAdapter.of(model).routers
    metrics = {} if controller is None else {name: value.item() for name, value in controller.metrics().items()}
    load = {} if controller is None else dict(
        zip(controller.load.names, (sent.tolist() for sent in controller.load.assignments), strict=True)
    )  # fmt: skip
    launcher.close()
    return Outcome(loss, norm, gradients, {}), metrics, load


def balanced_truth(
    model_name: str, aux: float, z: float, *, groups: int = 1, **changes: Any
) -> tuple[Truth, dict[str, float]]:
    """Every document alone; ``load_balancing_loss_func`` layer by layer on all tokens, or on each of ``groups``.

    Groups are micro-batches of one rank: consecutive rows, their losses weighed by their tokens.
    """
    config = tiny_config(model_name, **changes)
    model = initial_model(config, "cpu")
    rows = global_rows(vocabulary(model_name))
    total = sum(supervised(documents) for documents in rows)
    loss, parts, tokens = torch.zeros((), dtype=torch.float64), [], []
    with Float64Throughout():
        for group in range(groups):
            logits: list[list[torch.Tensor]] = []
            for document in (d for row in rows[group * len(rows) // groups :][: len(rows) // groups] for d in row):
                output = model(input_ids=document.tokens[None], use_cache=False, output_router_logits=True)
                cross = F.cross_entropy(
                    output.logits[0][:-1], document.labels[1:], ignore_index=IGNORE, reduction="sum"
                )
                loss = loss + cross / total
                logits.append([layer.flatten(0, -2) for layer in output.router_logits])
            parts.append([torch.cat(layer) for layer in zip(*logits, strict=True)])
            tokens.append(len(parts[-1][0]))
        module = importlib.import_module(type(model).__module__)
        experts, top_k = parts[0][0].shape[-1], config.num_experts_per_tok
        with Float64Zeros():
            balance = sum(
                module.load_balancing_loss_func((layer,), experts, top_k) * count / sum(tokens) / len(layers)
                for layers, count in zip(parts, tokens, strict=True)
                for layer in layers
            )
        whole = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        z_loss = torch.stack([layer.logsumexp(-1).square().mean() for layer in whole]).mean()
        (loss + aux * balance + z * z_loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return Truth(loss.item(), norm.item(), gradients), {"aux_loss": balance.item(), "z_loss": z_loss.item()}
