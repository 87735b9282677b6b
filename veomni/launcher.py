"""The launcher: the few verbs a training loop calls. It delegates; every decision belongs to a strategy."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function
from torch.utils.data import DataLoader
from typing_extensions import override

from veomni.accelerators import Accelerator, select_accelerator
from veomni.batch.micro_batch import MicroBatch
from veomni.config.section import checked, section_of
from veomni.errors import EXIT_PREEMPTED, LoopError, ModelError
from veomni.launch.world import World
from veomni.logging import create_logger
from veomni.loop.checkpoint_schedule import CheckpointSchedule
from veomni.loop.dataloader import StepLoader, step_loader, warn_unsaved_loader
from veomni.loop.evaluation import Measure, evaluate
from veomni.loop.garbage import GarbageSchedule
from veomni.loop.losses import component_losses, source_metrics
from veomni.loop.randomness import RandomState, seed_process, use_deterministic_algorithms
from veomni.loop.reporter import Reporter
from veomni.loop.step import ModelStep, Step, Weight, check_gradients
from veomni.loop.step_reader import StepReader, last_step
from veomni.moe import MoEOptions
from veomni.strategies import ParameterStrategy, Strategy
from veomni.strategies.base import sync_gradients
from veomni.strategies.select import parameter_strategy, select_strategies
from veomni.strategies.transforms.precision import Precision, select_precision

logger = create_logger(__name__)

_OBJECTS = frozenset({"strategy", "accelerator", "precision", "reporter", "checkpoints"})
"""Arguments of the launcher that select or are components, which check their own."""


class Launcher(World):
    """Compose strategies and an accelerator, and give a training loop its verbs (``examples/minimal.py``).

    Verbs that say "collective" must be called on all ranks.

    Args:
        strategy: A strategy, its name, or several that compose, transforms of the model among them; "auto" is FSDP2.
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

    def __init__(
        self,
        strategy: str | Strategy | Sequence[Strategy] = "auto",
        *,
        accelerator: str | Accelerator = "auto",
        precision: str | Precision = "fp32",
        devices: Annotated[int, Ge(1)] | None = None,
        backend: str = "auto",
        seed: Annotated[int, Ge(0), Lt(2**63)] = 0,
        deterministic: bool = False,
        timeout_seconds: Annotated[float, Gt(0)] = 1800.0,
        reporter: Reporter | None = None,
        checkpoints: CheckpointSchedule | None = None,
    ) -> None:
        plain = {"devices": devices, "backend": backend, "seed": seed, "deterministic": deterministic}
        checked(section_of(Launcher, supplied=_OBJECTS), {**plain, "timeout_seconds": timeout_seconds})
        timeout = timedelta(seconds=timeout_seconds)
        chosen, runs_on = select_strategies(strategy), select_accelerator(accelerator)
        super().__init__(chosen, runs_on, devices=devices, backend=backend, timeout=timeout)
        self.parameter_strategy: ParameterStrategy = parameter_strategy(self.strategies)
        self.precision = precision if isinstance(precision, Precision) else select_precision(precision)
        self.seed, self.deterministic = seed, deterministic
        self.reporter = reporter or Reporter(progress_bar=False)
        self.reporter.profile.check(runs_on)
        self.checkpoints = checkpoints or CheckpointSchedule()
        self.step = 0

    @override
    def launch(self) -> None:
        super().launch()
        self.reporter.profile.open(self.reporter.output_dir, self)
        seed_process(self.seed, self.rank)
        if self.deterministic:
            use_deterministic_algorithms()
        names = " + ".join(strategy.name for strategy in self.strategies)
        logger.info_rank0("%s ranks on %s, %s, %s", self.world_size, self.device.type, names, self.precision.name)

    def setup_model(self, model: nn.Module, *, fused_loss: bool = True, router: MoEOptions | None = None,
                    broadcast_weights: bool = False) -> nn.Module:  # fmt: skip
        """Shard a model, give it its weights and return the module to call; collective.

        Args:
            model: From ``build_model`` (on the meta device), or any module, which keeps the values of rank 0.
            fused_loss: Fuse the head with the loss where that is exact.
            router: How experts are balanced and their load is reported; None is ``MoEOptions()``.
            broadcast_weights: Rank 0 reads the weights and sends them, instead of every rank reading its shards.
        """
        from veomni.models.setup import setup_model

        return setup_model(self, model, fused_loss=fused_loss, router=router, broadcast_weights=broadcast_weights)

    def setup_optimizer(self, model: nn.Module, factory: Callable[..., Optimizer], **options: Any) -> Optimizer:
        """Return ``factory`` applied to the trainable parameters of what :meth:`setup_model` returned.

        Each of its meshes gets an optimizer in a ``MultiOptimizer``. ``options`` are what the factory takes, and
        ``no_decay`` and ``lr_scale`` of :func:`~veomni.optim.build_optimizer`.
        """
        from veomni.optim import build_optimizer

        if any(parameter.is_meta for parameter in model.parameters()):
            raise ModelError("the optimizer was built before the model was sharded", "call setup_model first")
        optimizer = build_optimizer(model, factory, **{"weight_decay": 0.0, "no_decay": (), **options})
        optimizer.register_step_pre_hook(check_gradients)
        return optimizer

    def setup_dataloader(self, loader: DataLoader[Any], *, accumulate: int = 1, epochs: int = 1) -> StepLoader:
        """Return the steps of any torch loader for :meth:`track`, sharded over data ranks and resumable.

        The loader is as for one process; what it collates is a micro-batch, and ``accumulate`` of them are a step of
        each rank. One iteration has so many ``epochs``; 1 for an iterable dataset.
        """
        return step_loader(loader, self.data_parallel, seed=self.seed, accumulate=accumulate, epochs=epochs)

    def track(
        self, loader: Iterable[Any], *, max_steps: int | None = None, gc_steps: Annotated[int, Ge(1)] | None = 50
    ) -> Iterator[Step]:
        """Yield one optimizer step at a time until the data or ``max_steps`` ends; collective.

        A rank without a batch ends the loop on all ranks. So does a signal to any rank, after the current step has been
        saved by :meth:`checkpoint`; the process then exits with 75. All ranks raise a NonFiniteError where the loss of
        an earlier step was not finite.

        Args:
            loader: Yields lists of this data rank's micro-batches (``MicroBatch.of`` names the kinds).
            max_steps: The last step of the run, counted from 1.
            gc_steps: Steps between runs of Python's garbage collector, at the same step on all ranks, and of objects
                made since the first step only; null leaves it to Python, which stops one rank at a time.
        """
        return self._collected(GarbageSchedule(gc_steps), loader, max_steps)

    def _collected(self, garbage: GarbageSchedule, loader: Iterable[Any], max_steps: int | None) -> Iterator[Step]:
        with closing(garbage):
            yield from self._steps(loader, max_steps, garbage)

    def _steps(self, loader: Iterable[Any], max_steps: int | None, garbage: GarbageSchedule) -> Iterator[Step]:
        reader = StepReader(loader, self, self.reporter.measure)
        total = max_steps if max_steps is not None else last_step(loader, self.step)
        self.reporter.start(self.step, total)
        while total is None or self.step < total:
            garbage.before(self.step + 1)
            self.reporter.start_step(self.step + 1)
            with record_function("data"):
                step = reader.read(self.step + 1)
            if step is None:
                self.checkpoints.last = True  # the data has ended: what is saved now is final
                break
            self.step, self.reporter.step = step.index, step
            self.checkpoints.stopping, self.checkpoints.last = step.stopping, self.step == total
            self.reporter.clock.mark("data")
            yield step
            reader.finish(step)
            self.reporter.profile.finish_step(requested=step.profiling)
            self.profile_signal.requested &= not step.profiling  # also of a signal that reached several ranks
            if step.stopping:
                name = self.signal.signal_name
                logger.info_rank0("stopped by %s after step %s; the checkpoint is saved", name, self.step)
                self.reporter.close("preempted")
                self.checkpoints.close()
                raise SystemExit(EXIT_PREEMPTED)
        reader.close()
        self.reporter.end_loop()

    def accumulate(self, model: nn.Module, step: Step, *, weight: Weight | None = None) -> Iterator[MicroBatch]:
        """Yield the step's micro-batches on the device; gradients are exchanged in the last one's backward only.

        Several models may be accumulated on in one loop, also interleaved. ``weight`` returns what the loss of a
        micro-batch averages over, a number; the call is then collective. None is the (weighted) supervised tokens for
        causal language models, whose loss shifts labels by one, the labels that are not -100 for other models, and the
        rows where there are no labels.
        """
        if not isinstance(step, Step):
            raise LoopError(f"accumulate() was given a {type(step).__name__}", "give it what launcher.track yields")
        yield from step.accumulate(model, partial(sync_gradients, self.strategies), weight)
        self.reporter.clock.mark("compute")

    def backward(self, loss: Tensor | Mapping[str, Tensor], micro: MicroBatch) -> None:
        """Add this micro-batch's gradients, and those of its routers' losses; every loop must use this call.

        The loss is the mean over what the micro-batch weighs (see :meth:`accumulate`); of a composed model, its
        ``losses`` by component, each the mean over its own tokens, whose sum is optimized. All ranks raise a
        NonFiniteError where logits of a router are not finite.
        """
        owner = getattr(micro, "owner", None)
        if not isinstance(owner, ModelStep):
            problem = f"backward() was given a {type(micro).__name__} that is of no step"
            raise LoopError(problem, "give it what launcher.accumulate yields")
        owner.backward(loss, micro)

    def global_loss(self, step: Step, model: nn.Module | None = None) -> Tensor:
        """Return the mean loss of the step, equal on all ranks; ``model`` where there are several; collective."""
        loss = step.of(model).loss.clone()
        dist.all_reduce(loss, group=self.state.group("loss"))
        return loss

    def global_losses(self, step: Step, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Return the mean loss of every component over its tokens of the step as ``loss_NAME``; collective."""
        return component_losses(step.of(model), self.state)

    def source_metrics(self, step: Step, model: nn.Module | None = None) -> dict[str, float | int | None]:
        """Return what each source of a mixture has in the step, equal on all ranks; collective.

        ``source_loss/NAME`` is its (weighted) mean loss, None without supervised tokens; ``source_samples/NAME`` and
        ``source_tokens/NAME`` are its documents and all of their tokens.
        """
        return source_metrics(step.of(model), self.state)

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale gradients to a norm of at most ``max_norm`` and return the norm they had; collective.

        All ranks raise a NonFiniteError where the norm is not finite, before any parameter changes.
        """
        from veomni.strategies.grad_norm import clip_gradients

        if self.reporter.step is not None:
            self.reporter.step.of(model).check_complete()
        with record_function("clip"):
            norm = self.parameter_strategy.grad_norm(model)
            clip_gradients(model.parameters(), norm, max_norm)
        return norm

    def log(self, metrics: Mapping[str, float | int | Tensor | None]) -> None:
        """Report numbers of the current step: the progress bar, ``metrics.jsonl`` and the other loggers."""
        self.reporter.report(metrics)

    def evaluate(
        self, model: nn.Module, loader: Iterable[Any], *, answers: bool = False, loss: Measure | None = None
    ) -> dict[str, float]:
        """Return ``eval_loss`` over a held-out loader, equal on all ranks; collective.

        Also ``perplexity`` of a causal language model, ``eval_loss/NAME`` for each source of a mixture, and
        ``eval_loss_NAME`` for each decoder of a composed model.

        Args:
            model: From :meth:`setup_model`.
            loader: Gives every rank the same number of micro-batches, in lists, and is not empty; else a LoopError.
            answers: Also return ``eval_accuracy``, the share of documents answered right to the last token.
            loss: ``loss(model, micro)`` returns the mean loss of a micro-batch, or means by name, returned as
                ``eval_NAME``; None takes the ``loss`` of the model's output.
        """
        self.reporter.clock.mark("optimizer")
        found = evaluate(model, loader, self, answers=answers, measure=loss)
        self.reporter.clock.mark("evaluation")
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
        """Write the model in Hugging Face layout, one parameter at a time; collective."""
        from veomni.models import export_hf

        return export_hf(model, Path(output_dir), tokenizer=tokenizer)

    def close(self) -> None:
        """Finish what runs in the background and put the process back to where it was before :meth:`launch`."""
        self.checkpoints.close()
        self.reporter.close("finished")
        self.leave()
