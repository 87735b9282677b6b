"""The truth: one process, float64, every document by itself, no packing, no sharding, PyTorch's own cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tests.models.tiny import tiny_config
from tests.parity.documents import IGNORE, Document, global_rows, supervised
from veomni.models import Materializer, build_model
from veomni.strategies.transforms.compute_dtype import Float64Throughout


@dataclass
class Truth:
    loss: float
    grad_norm: float
    gradients: dict[str, torch.Tensor]


def vocabulary(name: str) -> int:
    return int(tiny_config(name).vocab_size)


def initial_model(config: Any, device: str, seed: int = 0, weights: str = "random") -> torch.nn.Module:
    """The tiny model as every layout must start with it: drawn in float32 on ``device``, computed with in float64."""
    model = build_model(config, attention="eager", weights=weights)
    Materializer(model, device=torch.device(device), seed=seed)(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.train()


def oracle(name: str, device: str = "cpu", weights: str = "random", **changes: Any) -> Truth:
    return truth_of(tiny_config(name, **changes), global_rows(vocabulary(name)), device, weights)


def truth_of(config: Any, rows: list[list[Document]], device: str = "cpu", weights: str = "random") -> Truth:
    model = initial_model(config, device, weights=weights)
    return backward_of(model, rows, device)


def backward_of(model: torch.nn.Module, rows: list[list[Document]], device: str = "cpu") -> Truth:
    """Leave the gradients of a step in ``model`` and return them."""
    total = sum(supervised(documents) for documents in rows)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with Float64Throughout():
        for document in (document for documents in rows for document in documents):
            logits = model(input_ids=document.tokens[None].to(device), use_cache=False).logits[0]
            part = F.cross_entropy(
                logits[:-1].double(), document.labels[1:].to(device), ignore_index=IGNORE, reduction="sum"
            )
            (part / total).backward()
            loss += part.detach() / total
    gradients = {
        name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return Truth(loss.item(), norm.item(), gradients)
