"""The launcher: the few verbs a training loop calls. It delegates; every decision belongs to a strategy.

The loop stays the user's::

    launcher = Launcher(FSDP2(), precision="bf16")
    launcher.launch()
    model = launcher.setup_model(build_model("Qwen3-8B/"))
    optimizer = launcher.setup_optimizer(model, AdamW, lr=1e-5)
    for step in launcher.track(loader):
        for micro in launcher.accumulate(model, step):
            launcher.backward(model(**micro.inputs).loss, micro)
        launcher.clip_grad_norm(model, 1.0)
        optimizer.step(); optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from veomni.accelerators import Accelerator, select_accelerator
from veomni.batch.micro_batch import MicroBatch
from veomni.batch.split import SequenceShard
from veomni.errors import EXIT_PREEMPTED, LoopError
from veomni.launch import StopSignal
from veomni.launch.world import World, join_world
from veomni.logging import create_logger
from veomni.loop.checkpoint_schedule import CheckpointSchedule
from veomni.loop.dataloader import StepLoader, check_loader, step_loader, warn_unsaved_loader
from veomni.loop.evaluation import Evaluation, Measure
from veomni.loop.losses import component_losses, source_metrics
from veomni.loop.randomness import RandomState, seed_process, use_deterministic_algorithms
from veomni.loop.reporter import Reporter
from veomni.loop.step import Step, Weight, counts_of, listed, totals_of
from veomni.loop.sync import sync_step
from veomni.parallel.mesh import ParallelState, set_parallel_state
from veomni.strategies import ParameterStrategy, Strategy
from veomni.strategies.base import sync_gradients
from veomni.strategies.select import parameter_strategy, select_strategies
from veomni.strategies.transforms.precision import Precision, select_precision

if TYPE_CHECKING:
    from veomni.moe import MoEOptions

logger = create_logger(__name__)

_KNOWN_ONCE_LAUNCHED = ("world", "state", "device", "rank", "world_size", "local_rank")


class DataParallel(NamedTuple):
    """This process's place among the ranks that read different rows."""

    rank: int
    size: int


class Launcher:
    """Compose strategies and an accelerator, and give a training loop its verbs.

    Args:
        strategy: A strategy, the name of one, or several that compose, transforms of the model as activation
            checkpointing among them; "auto" is FSDP2.
        accelerator: An accelerator, the name of one, or "auto".
        precision: "fp64", "fp32" or "bf16" (bf16 compute over fp32 master weights and fp32 gradient reduction).
        devices: Processes on this node; None takes every device, or one process on a CPU.
        backend: Collective backend; "auto" is the accelerator's. "gloo" lets several ranks share one device.
        seed: Of weights, data order and dropout.
        deterministic: Choose reproducible kernels only.
        timeout_seconds: How long a collective waits for the other ranks; overridden by ``NCCL_TIMEOUT``.
        reporter: Where numbers go; None prints and writes nothing.
        checkpoints: When and where to save; None never saves.
    """

    world: World
    state: ParallelState
    device: torch.device
    rank: int
    world_size: int
    local_rank: int

    def __init__(
        self,
        strategy: str | Strategy | Sequence[Strategy] = "auto",
        *,
        accelerator: str | Accelerator = "auto",
        precision: str | Precision = "fp32",
        devices: int | None = None,
        backend: str = "auto",
        seed: int = 0,
        deterministic: bool = False,
        timeout_seconds: float = 1800.0,
        reporter: Reporter | None = None,
        checkpoints: CheckpointSchedule | None = None,
    ) -> None:
        self.strategies = select_strategies(strategy)
        self.parameter_strategy: ParameterStrategy = parameter_strategy(self.strategies)
        self.accelerator = select_accelerator(accelerator)
        self.precision = precision if isinstance(precision, Precision) else select_precision(precision)
        self.devices, self.seed, self.deterministic = devices, seed, deterministic
        self.backend = self.accelerator.backend if backend == "auto" else backend
        self.timeout = timedelta(seconds=timeout_seconds)
        self.reporter = reporter or Reporter()
        self.checkpoints = checkpoints or CheckpointSchedule()
        self.step = 0
        self._current: Step | None = None
        self._stop: StopSignal | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in _KNOWN_ONCE_LAUNCHED:
                raise LoopError(f"launcher.{name} is known once processes are joined", "call launcher.launch() first")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ---------------------------------------------------------------- processes

    def launch(self) -> None:
        """Join the launch this process is part of, or start ``devices`` processes and supervise them.

        In the process that people start, this does not return when it has to start others.

        Raises:
            InputError: the environment, the strategies and the devices contradict each other; nothing was started.
        """
        self.world = join_world(
            self.strategies, self.accelerator, devices=self.devices, backend=self.backend, timeout=self.timeout
        )
        self.state, self.device = self.world.state, self.world.device
        self.rank, self.world_size, self.local_rank = self.world.rank, self.world.world_size, self.world.local_rank
        self._stop = StopSignal()
        seed_process(self.seed, self.rank)
        if self.deterministic:
            use_deterministic_algorithms()
        names = " + ".join(strategy.name for strategy in self.strategies)
        logger.info_rank0("%s ranks on %s, %s, %s", self.world_size, self.device.type, names, self.precision.name)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @property
    def data_parallel(self) -> DataParallel:
        """This process's place among the ranks that read different rows, for a loader."""
        return DataParallel(self.state.rank("data"), self.state.size("data"))

    @property
    def sequence_shard(self) -> SequenceShard:
        """Which positions of every row this process holds, for a loader that splits rows in its workers."""
        return self.state.sequence_shard

    def barrier(self) -> None:
        """Wait for all ranks; collective: call on all ranks."""
        dist.barrier()

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the body on rank 0, then on the others: for work whose result rank 0 leaves on disk; collective."""
        if not self.is_rank_zero:
            self.barrier()
        yield
        if self.is_rank_zero:
            self.barrier()

    # ---------------------------------------------------------------- setup

    def setup_model(
        self,
        model: nn.Module,
        *,
        fused_loss: bool = True,
        router: MoEOptions | None = None,
        broadcast_weights: bool = False,
    ) -> nn.Module:
        """Shard ``model``, give it its weights and return the module to call; collective: call on all ranks.

        Args:
            model: From ``build_model`` (on the meta device), or any module; a module that already has values keeps
                rank 0's.
            fused_loss: Fuse the head with the loss where that is exact.
            router: How experts are balanced and their load is reported; None is ``MoEOptions()``.
            broadcast_weights: Rank 0 reads the weights and sends them, instead of every rank reading its shards.
        """
        from veomni.models.setup import setup_model

        return setup_model(self, model, fused_loss=fused_loss, router=router, broadcast_weights=broadcast_weights)

    def setup_optimizer(self, model: nn.Module, factory: Callable[..., Optimizer], **options: Any) -> Optimizer:
        """Return ``factory`` applied to the model's trainable parameters; to be called after :meth:`setup_model`.

        Parameters on several device meshes, as experts are, get an optimizer for each behind one ``MultiOptimizer``.

        Args:
            model: What :meth:`setup_model` returned.
            factory: An optimizer class.
            options: What the factory takes; ``no_decay``: name patterns of parameters without weight decay; and
                ``lr_scale``: name patterns to factors of the learning rate.

        Raises:
            ModelError: the model still has parameters without storage: it has not been set up.
        """
        from veomni.optim.setup import setup_optimizer

        return setup_optimizer(model, factory, **options)

    def setup_dataloader(self, loader: DataLoader[Any], *, accumulate: int = 1, epochs: int = 1) -> StepLoader:
        """Return a loader of steps for :meth:`track`: any torch loader, sharded over data ranks and resumable.

        Args:
            loader: As for one process: over a map-style or iterable dataset, with any sampler and ``collate_fn``;
                what it collates is one micro-batch. See :func:`veomni.loop.dataloader.step_loader`.
            accumulate: Micro-batches of a step on each rank.
            epochs: Epochs of one iteration; 1 for an iterable dataset.
        """
        return step_loader(loader, self.data_parallel, seed=self.seed, accumulate=accumulate, epochs=epochs)

    # ---------------------------------------------------------------- one step

    def track(self, loader: Iterable[Any], *, max_steps: int | None = None) -> Iterator[Step]:
        """Yield one optimizer step at a time until the data or ``max_steps`` ends; show progress on rank 0.

        A rank without a batch ends the loop on all ranks. A signal to any rank ends it on all of them, after the step
        in hand has been saved by :meth:`checkpoint`; the process then exits with 75. Collective: call on all ranks.

        Args:
            loader: Yields the list of this data rank's micro-batches of a step (``MicroBatch.of`` says of what kinds).
            max_steps: The last step of the whole run, counted from 1.

        Raises:
            LoopError: the last step was left incomplete.
            DataError: the loader yields something else.
        """
        check_loader(loader)
        total = max_steps if max_steps is not None else _length(loader, self.step)
        self.reporter.start(self.step, total)
        iterator = iter(loader)
        while total is None or self.step < total:
            self.reporter.begin_step()
            step = self._next_step(next(iterator, None), loader)
            if step is None:
                self.checkpoints.last = True  # the data has ended: what is saved now is final
                break
            self.checkpoints.last = self.step == total
            self.reporter.mark("data")
            yield step
            step.check_complete()
            if self.checkpoints.stopping:
                self._exit_preempted()
        self.reporter.end_loop()

    def _next_step(self, batch: Any, loader: Any) -> Step | None:
        micro_batches = [self._shard(micro) for micro in listed(batch)] if batch is not None else []
        ended = getattr(loader, "exhausted", False)
        exhausted = batch is not None and ended and all(micro.is_empty for micro in micro_batches)
        counts = counts_of(micro_batches, self.reporter.measure(micro_batches), self.state.size("sequence"))
        assert self._stop is not None
        decisions = {"ready": batch is not None, "exhausted": exhausted, "stop": self._stop.requested}
        sums = sync_step({**decisions, **counts})
        ready, no_more, stop = (sums.pop(name) for name in decisions)
        if no_more == self.world_size:
            return None
        if ready < self.world_size:
            if ready:
                logger.warning_rank0("uneven data: dropped a last batch held by only %d of %s ranks", ready,
                                     self.world_size)  # fmt: skip
            return None
        self.step += 1
        self.checkpoints.stopping = stop > 0
        self._current = Step(self.step, micro_batches, totals_of(sums), self.world)
        return self._current

    def _shard(self, micro: MicroBatch) -> MicroBatch:
        for strategy in self.strategies:
            micro = strategy.shard(micro, self.state)
        return micro

    def accumulate(self, model: nn.Module, step: Step, *, weight: Weight | None = None) -> Iterator[MicroBatch]:
        """Yield the step's micro-batches on the device; gradients are exchanged in the last one's backward only.

        Several models may be accumulated on in one loop, also interleaved.

        Args:
            model: What :meth:`setup_model` returned.
            step: What :meth:`track` yielded.
            weight: Returns what the loss of a micro-batch averages over, a number; None is the weighted number of
                supervised tokens for causal language models, whose loss shifts labels by one, the labels that are not
                -100 for other models, and the rows where there are no labels. Given one, the call is collective.
        """
        if not isinstance(step, Step):
            problem = f"accumulate() was given a {type(step).__name__}"
            raise LoopError(problem, "give it a step that launcher.track(loader) yields")
        yield from step.accumulate(model, partial(sync_gradients, self.strategies), weight)
        self.reporter.mark("compute")

    def backward(self, loss: Tensor | Mapping[str, Tensor], micro: MicroBatch) -> None:
        """Add this micro-batch's gradients.

        Args:
            loss: The mean over what the micro-batch weighs (see :meth:`accumulate`). Of a composed model its
                ``losses`` by component, each the mean over its own tokens: "text", then its decoders.
            micro: What the loss was computed on, from :meth:`accumulate`.

        Gradients after the last backward are those of ``sum(weight * loss) / sum(weight)`` over all micro-batches of
        all ranks, whatever the layout: strategies average over the ``loss`` view, so each loss is weighted by its share
        times the size of that view. Losses by component are each such a mean, and their sum is optimized.

        The losses of routers add their gradients here, and with the last backward the step of the routers ends, before
        any parameter changes: every loop must use this call.

        Raises:
            NonFiniteError: logits of a router are not finite; raised on all ranks.
            LoopError: the micro-batch is not from :meth:`accumulate`.
            ModelError: the loss is None.
        """
        if not isinstance(micro, MicroBatch) or micro.owner is None:
            problem = f"backward() was given a {type(micro).__name__} that is of no step"
            raise LoopError(problem, "give it a micro-batch that launcher.accumulate(model, step) yields")
        micro.owner.backward(loss, micro)

    def global_loss(self, step: Step, model: nn.Module | None = None) -> Tensor:
        """Return the (weighted) mean loss of the step, equal on all ranks; collective: call on all ranks.

        Args:
            step: The step.
            model: The model, where several were accumulated on.
        """
        loss = step.of(model).loss.clone()
        dist.all_reduce(loss, group=self.state.group("loss"))
        return loss

    def global_losses(self, step: Step, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Return the mean loss of every component over its tokens of the step as ``loss_NAME``; collective."""
        return component_losses(step.of(model), self.state)

    def source_metrics(self, step: Step, model: nn.Module | None = None) -> dict[str, float | int | None]:
        """Return what a mixture's sources have in the step, equal on all ranks; nothing for other data; collective.

        For each source, by its name: ``source_loss/NAME``, the (weighted) mean over its supervised tokens (None without
        any); ``source_samples/NAME`` and ``source_tokens/NAME``, its documents and all of their tokens.
        """
        return source_metrics(step.of(model), self.state)

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale gradients to a norm of at most ``max_norm`` and return the norm they had.

        Collective: call on all ranks.

        Raises:
            NonFiniteError: the norm is not finite; raised on all ranks, before any parameter changes.
            LoopError: a micro-batch of the step was not backpropagated.
        """
        from veomni.strategies.grad_norm import clip_gradients

        if self._current is not None:
            self._current.check_complete()
        norm = self.parameter_strategy.grad_norm(model)
        clip_gradients(model.parameters(), norm, max_norm)
        return norm

    # ---------------------------------------------------------------- between steps

    def log(self, metrics: Mapping[str, float | int | Tensor | None]) -> None:
        """Report numbers of the current step: the progress bar, ``metrics.jsonl`` and the other loggers.

        Raises:
            LoopError: there is no step, or a micro-batch of it was not backpropagated.
        """
        if self._current is None:
            raise LoopError("log() was called before the first step", "call it inside the loop over launcher.track")
        self._current.check_complete()
        self.reporter.report({**metrics, **self._current.routing()}, self._current)
        for load in self._current.expert_loads():
            self.reporter.report_expert_load(load, self._current)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, loader: Iterable[Any], *, answers: bool = False, loss: Measure | None = None
    ) -> dict[str, float]:
        """Return ``eval_loss`` over a held-out loader, equal on all ranks; collective: call on all ranks.

        Of a causal language model, also ``perplexity``; of a mixture, ``eval_loss/NAME`` for each source; of a composed
        model, ``eval_loss_NAME`` for each decoder.

        Args:
            model: What :meth:`setup_model` returned.
            loader: A loader that gives every rank the same number of micro-batches.
            answers: Also return ``eval_accuracy``, the share of documents whose answers are right to the last token
                (:class:`veomni.metrics.AnswerAccuracy`), and of a mixture ``eval_accuracy/NAME``.
            loss: ``loss(model, micro)`` returns the mean loss of a micro-batch, or a dict of means by name
                (``{"loss": ..., "accuracy": ...}``, returned as ``eval_NAME``); None takes the ``loss`` of the model's
                output.

        Raises:
            ModelError: the model returns no loss; or answers are asked for, and the model computes its loss itself.
        """
        total = Evaluation(model, self.world, answers=answers, measure=loss)
        training = model.training
        self.reporter.mark("optimizer")
        model.eval()
        for batch in loader:
            for micro in listed(batch):
                total.add(self._shard(micro))
        model.train(training)
        found = total.compute()
        self.reporter.mark("evaluation")
        return found

    def checkpoint(self, state: Mapping[str, Any]) -> None:
        """Save ``state`` when it is due: every N steps, after a signal, and at the end; collective."""
        self.checkpoints.save_if_due({**state, "rng": RandomState(self.accelerator)}, self.step)

    def resume(self, state: Mapping[str, Any]) -> int:
        """Load the checkpoint to continue from into ``state`` and return its step; 0 when there is none; collective."""
        self.step = self.checkpoints.resume({**state, "rng": RandomState(self.accelerator)})
        self.reporter.resume_from(self.step)
        warn_unsaved_loader(state, self.step)
        return self.step

    def export(self, model: nn.Module, output_dir: Path | str, *, tokenizer: Any = None) -> Path:
        """Write the model in Hugging Face layout, one parameter at a time; collective: call on all ranks."""
        from veomni.models import export_hf

        return export_hf(model, Path(output_dir), tokenizer=tokenizer)

    def close(self) -> None:
        """Finish what runs in the background and put the process back as it was."""
        self.checkpoints.close()
        self.reporter.close("finished")
        if self._stop is not None:
            self._stop.close()
        set_parallel_state(None)

    def _exit_preempted(self) -> None:
        assert self._stop is not None
        logger.info_rank0("stopped by %s after step %s; the checkpoint is saved", self._stop.signal_name, self.step)
        self.reporter.close("preempted")
        self.checkpoints.close()
        raise SystemExit(EXIT_PREEMPTED)


def _length(loader: Any, done: int) -> int | None:
    remaining = getattr(loader, "remaining_steps", None)
    if remaining is not None:
        return done + int(remaining)
    return done + len(loader) if hasattr(loader, "__len__") else None


__all__ = ["DataParallel", "Launcher"]
