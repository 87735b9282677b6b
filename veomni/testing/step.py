"""One step of the launcher's loop on some layout, to be compared with the oracle's."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.moe import RoutingLog, replay_routing
from veomni.parallel.wrappers import plain_name, unwrap
from veomni.testing.documents import Document, global_rows, share
from veomni.testing.oracle import BOUNDS, Truth, check, truth_of
from veomni.testing.ranks import run_ranks
from veomni.testing.routing import Choices, packed_routing

_OF_SETUP = ("fused_loss", "router", "broadcast_weights")


@dataclass
class Outcome(Truth):
    """A step on a layout, equal on all ranks; ``clipped`` are the gradients after clipping."""

    clipped: dict[str, Tensor] = field(default_factory=dict)


def train_step(
    config: Any,
    strategies: Callable[[], Any],
    *,
    rows: list[list[Document]] | None = None,
    accumulation: int = 1,
    max_norm: float = 1e9,
    weights: str = "random",
    attention: str = "auto",
    choices: Sequence[Choices] | None = None,
    **options: Any,
) -> Outcome:
    """Run one step; what every rank of :func:`veomni.testing.ranks.run_ranks` calls, with ``init=False``.

    ``strategies`` makes the launcher's; ``rows`` are the global batch, those of :func:`global_rows` by default, in
    ``accumulation`` micro-batches on each rank; ``weights`` and ``attention`` are as ``build_model`` takes them.
    ``choices`` are the experts of each document, which are chosen again; None leaves the choice to the model.
    ``options`` are the launcher's, or those of ``setup_model``; float64 on CPUs is the default.
    """
    setup = {name: options.pop(name) for name in _OF_SETUP if name in options}
    launcher = Launcher(
        strategies(), **{"accelerator": "cpu", "backend": "gloo", "precision": "fp64", "timeout_seconds": 60, **options}
    )
    launcher.launch()
    model = launcher.setup_model(build_model(config, weights=weights, attention=attention), **setup).train()
    rows = global_rows(config.get_text_config().vocab_size) if rows is None else rows
    place = launcher.data_parallel
    for batch in launcher.track([share(rows, place.rank, place.size, accumulation)]):
        with (
            nullcontext()
            if choices is None
            else replay_routing(model, routing_of(launcher, rows, choices, accumulation))
        ):
            for micro in launcher.accumulate(model, batch):
                launcher.backward(model(**micro.inputs).loss, micro)
        loss = launcher.global_loss(batch).item()
        gradients = full_gradients(model)
        norm = launcher.clip_grad_norm(model, max_norm).item()
    clipped = full_gradients(model)
    launcher.close()
    return Outcome(loss, norm, gradients, clipped)


def routing_of(
    launcher: Launcher, rows: list[list[Document]], choices: Sequence[Choices], accumulation: int
) -> RoutingLog:
    """Return what this rank replays of the choices of each document."""
    place = launcher.data_parallel
    log = packed_routing(rows, choices, place.rank, place.size, accumulation)
    sizes = [len(micro["input_ids"]) for micro in share(rows, place.rank, place.size, accumulation)]
    return log.shard(launcher.sequence_shard, sizes)


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter's whole gradient by its name in the user's module, on the CPU; collective."""
    flat = isinstance(model, FullyShardedDataParallel)
    found = {}
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True) if flat else nullcontext():
        for name, parameter in unwrap(model).named_parameters():
            if (grad := parameter.grad) is not None:
                whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                found[plain_name(name)] = whole.detach().cpu().clone()
    return found


def prove(
    config: Any, strategies: Callable[[], Any], world_size: int, *, precision: str = "fp64", **options: Any
) -> None:
    """Assert that a step on ``world_size`` ranks is the oracle's: loss, gradient norm and every parameter's gradient.

    ``config`` is of a small transformers causal model; ``options`` are those of :func:`train_step`.
    """
    run = partial(train_step, config, strategies, precision=precision, **options)
    truth = truth_of(config, options.get("rows"), weights=options.get("weights", "random"))
    for outcome in run_ranks(run, world_size, init=False):
        check(outcome, truth, BOUNDS[precision])
