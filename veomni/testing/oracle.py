"""The truth of a training step: one process, float64, every document alone, unsharded, PyTorch's own cross-entropy."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veomni.models import Materializer, build_model
from veomni.models.transformers_api.experts import has_experts
from veomni.strategies.transforms.float64 import Float64Throughout
from veomni.testing.documents import IGNORE, Document, global_rows, supervised, weights_of

BOUNDS = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 5e-2}
"""What a step may be off by in each precision: relative, for every tensor."""


@dataclass
class Truth:
    """A step: the (weighted) mean loss over the global batch, and gradients by parameter, whole and on the CPU."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]


def truth_of(
    config: Any, rows: list[list[Document]] | None = None, *, device: str = "cpu", weights: str = "random"
) -> Truth:
    """Return the true step of a transformers causal model; ``rows`` are those of :func:`global_rows` by default."""
    rows = global_rows(config.get_text_config().vocab_size) if rows is None else rows
    return backward_of(initial_model(config, device, weights=weights), rows, device)


def initial_model(config: Any, device: str = "cpu", seed: int = 0, weights: str = "random") -> nn.Module:
    """Return the model as every layout must start with it: drawn in float32 on ``device``, computed with in float64."""
    model = build_model(config, attention="eager", weights=weights)
    Materializer(model, device=torch.device(device), seed=seed)(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    if has_experts(model):
        model.set_experts_implementation("eager")  # type: ignore[operator]
    return model.train()


def backward_of(model: nn.Module, rows: list[list[Document]], device: str = "cpu") -> Truth:
    """Leave the gradients of a step in ``model`` and return them."""
    total = sum(supervised(documents) for documents in rows)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with Float64Throughout():
        for document in (document for documents in rows for document in documents):
            logits = model(input_ids=document.tokens[None].to(device), use_cache=False).logits[0]
            labels, weights = document.labels[1:].to(device), weights_of(document)[1:].to(device)
            each = F.cross_entropy(logits[:-1].double(), labels, ignore_index=IGNORE, reduction="none")
            part = (each * weights).sum()
            (part / total).backward()
            loss += part.detach() / total
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Truth(loss.item(), float(nn.utils.get_total_norm(gradients.values())), gradients)


def check(found: Truth, truth: Truth, bound: float) -> None:
    """Assert that loss, norm and every parameter's gradient are the truth's, relative and tensor by tensor."""
    # Loss curves hide gradients of a wrong scale.
    missing = found.gradients.keys() ^ truth.gradients.keys()
    assert not missing, f"gradients on one side only: {sorted(missing)}"
    errors = {name: relative_error(found.gradients[name], tensor) for name, tensor in truth.gradients.items()}
    wrong = {name: error for name, error in errors.items() if not error <= bound}
    assert not wrong, f"gradients off by more than {bound}: {wrong}"
    assert abs(found.loss - truth.loss) <= bound * abs(truth.loss), f"loss {found.loss}, not {truth.loss}"
    assert abs(found.grad_norm - truth.grad_norm) <= bound * truth.grad_norm, (found.grad_norm, truth.grad_norm)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the expected tensor's unless that is zero."""
    scale = expected.double().norm()
    difference = (found.double() - expected.double()).norm()
    return float(difference / scale) if scale else float(difference)
