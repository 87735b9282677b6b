"""The launcher: the few verbs a training loop calls. It delegates; every decision belongs to a strategy.

The loop stays the user's::

    launcher = Launcher(FSDP2(), precision="bf16")
    launcher.launch()
    model = launcher.setup_model(build_model("Qwen3-8B/"))
    optimizer = launcher.setup_optimizer(model, AdamW, lr=1e-5)
    for batch in launcher.track(loader):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        launcher.clip_grad_norm(model, 1.0)
        optimizer.step(); optimizer.zero_grad()
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from veomni.accelerators import Accelerator, select_accelerator
from veomni.batch.counts import token_weight
from veomni.batch.fields import component_tokens
from veomni.batch.micro_batch import MicroBatch
from veomni.batch.split import SequenceShard
from veomni.errors import EXIT_PREEMPTED, ModelError
from veomni.launch import Environment, StopSignal, collective_timeout, detect_environment, join_or_start
from veomni.logging import create_logger
from veomni.loop.checkpoint_schedule import CheckpointSchedule
from veomni.loop.dataloader import StepLoader, check_loader, step_loader, warn_unsaved_loader
from veomni.loop.evaluation import Evaluation
from veomni.loop.losses import part_losses, shared_loss, source_metrics, summed_parts
from veomni.loop.randomness import RandomState, same_draws_after, seed_process, use_deterministic_algorithms
from veomni.loop.reporter import Reporter
from veomni.loop.step import StepBatch, StepWork
from veomni.loop.sync import agree
from veomni.parallel.mesh import ParallelState, set_parallel_state
from veomni.strategies import ParameterStrategy, Strategy
from veomni.strategies.base import SetupContext
from veomni.strategies.select import mesh_dims, parameter_strategy, select_strategies
from veomni.strategies.transforms.activation_checkpointing import Recompute, apply_recompute
from veomni.strategies.transforms.compile import compile_blocks
from veomni.strategies.transforms.encoder_balance import balance_towers
from veomni.strategies.transforms.precision import Precision, select_precision

if TYPE_CHECKING:
    from veomni.models import LossContext, TokenMeanLoss
    from veomni.moe import MoEOptions, RouterController

logger = create_logger(__name__)

_BUCKET_BYTES = 250 * 1024**2  # DDP's own at the start


class DataParallel(NamedTuple):
    """This process's place among the ranks that read different rows."""

    rank: int
    size: int


class Launcher:
    """Compose strategies and an accelerator, and give a training loop its verbs.

    Args:
        strategy: A strategy, the name of one, or several that compose; "auto" is FSDP2.
        accelerator: An accelerator, the name of one, or "auto".
        precision: "fp64", "fp32" or "bf16" (bf16 compute over fp32 master weights and fp32 gradient reduction).
        devices: Processes on this node; None takes every device, or one process on a CPU.
        backend: Collective backend; "auto" is the accelerator's. "gloo" lets several ranks share one device.
        seed: Of weights, data order and dropout.
        recompute: Activation checkpointing: "none", "full" or "selective".
        compile: Compile each block with ``torch.compile``.
        balance_towers: Let ranks encode each other's images, videos and sounds, so that all have as much to do.
        fused_loss: Fuse the head with the loss where that is exact.
        broadcast_weights: Rank 0 reads the weights and sends them, instead of every rank reading its shards.
        router: How experts are balanced and their load is reported; None is ``MoEOptions()``.
        deterministic: Choose reproducible kernels only.
        timeout_seconds: How long a collective waits for the other ranks; the variable ``NCCL_TIMEOUT`` goes before it.
        reporter: Where numbers go; None prints and writes nothing.
        checkpoints: When and where to save; None never saves.
    """

    def __init__(
        self,
        strategy: str | Strategy | Sequence[Strategy] = "auto",
        *,
        accelerator: str | Accelerator = "auto",
        precision: str | Precision = "fp32",
        devices: int | None = None,
        backend: str = "auto",
        seed: int = 0,
        recompute: Recompute = "none",
        compile: bool = False,
        balance_towers: bool = False,
        fused_loss: bool = True,
        router: MoEOptions | None = None,
        broadcast_weights: bool = False,
        deterministic: bool = False,
        timeout_seconds: float = 1800.0,
        reporter: Reporter | None = None,
        checkpoints: CheckpointSchedule | None = None,
    ) -> None:
        self.strategies = select_strategies(strategy)
        self.parameter_strategy: ParameterStrategy = parameter_strategy(self.strategies)
        self.accelerator = select_accelerator(accelerator)
        self.precision = precision if isinstance(precision, Precision) else select_precision(precision)
        self.devices = devices
        self.backend = self.accelerator.backend if backend == "auto" else backend
        self.seed = seed
        self.recompute, self.compile, self.fused_loss = recompute, compile, fused_loss
        self.router = router
        self.broadcast_weights, self.deterministic = broadcast_weights, deterministic
        self.balance_towers = balance_towers
        self.timeout = timedelta(seconds=timeout_seconds)
        self.reporter = reporter or Reporter()
        self.checkpoints = checkpoints or CheckpointSchedule()
        self.step = 0
        self._stop: StopSignal | None = None
        self._batch: StepBatch | None = None
        self._controllers: WeakKeyDictionary[nn.Module, RouterController] = WeakKeyDictionary()
        self._controller: RouterController | None = None
        self._token_losses: WeakKeyDictionary[nn.Module, TokenMeanLoss] = WeakKeyDictionary()

    # ---------------------------------------------------------------- processes

    def launch(self) -> None:
        """Join the launch this process is part of, or start ``devices`` processes and supervise them.

        In the process that people start, this does not return when it has to start others.

        Raises:
            InputError: the environment, the strategies and the devices contradict each other; nothing was started.
        """
        asked = collective_timeout(os.environ)
        environment = self._join_or_start()
        if asked is not None:
            self.timeout = asked
            logger.info_rank0("collectives wait %s at most, as NCCL_TIMEOUT says", asked)
        self.device = self.accelerator.device(environment.local_rank)
        self.accelerator.set_device(self.device)
        self._init_process_group(environment.rank, environment.world_size)
        self.rank, self.world_size, self.local_rank = environment.rank, environment.world_size, environment.local_rank
        self.state = ParallelState(mesh_dims(self.strategies, self.world_size), self.device.type, timeout=self.timeout)
        set_parallel_state(self.state)
        self._stop = StopSignal()
        seed_process(self.seed, self.rank)
        if self.deterministic:
            use_deterministic_algorithms()
        names = " + ".join(strategy.name for strategy in self.strategies)
        logger.info_rank0("%s ranks on %s, %s, %s", self.world_size, self.device.type, names, self.precision.name)

    def _join_or_start(self) -> Environment:
        found = detect_environment(os.environ)
        devices = self.devices
        if found is None and devices is None:
            devices = self.accelerator.device_count()
        world_size, local = (devices, devices) if found is None else (found.world_size, found.local_world_size)
        assert world_size is not None
        assert local is not None
        for strategy in self.strategies:
            strategy.check(world_size)
        mesh_dims(self.strategies, world_size)
        self.accelerator.check_devices(local, shared=self.backend == "gloo")
        return join_or_start(devices)

    def _init_process_group(self, rank: int, world_size: int) -> None:
        if dist.is_initialized():
            return
        device_backend = f"cpu:gloo,{self.device.type}:{self.backend}" if self.device.type != "cpu" else "gloo"
        store = dist.HashStore() if world_size == 1 else None  # type: ignore[attr-defined]
        dist.init_process_group(device_backend, store=store, rank=rank, world_size=world_size, timeout=self.timeout)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @property
    def data_parallel(self) -> DataParallel:
        """This process's place among the ranks that read different rows; what a loader needs to know."""
        return DataParallel(self.state.rank("data"), self.state.size("data"))

    @property
    def sequence_shard(self) -> SequenceShard:
        """Which positions of every row this process holds; a loader that knows cuts rows in its workers."""
        return self.state.sequence_shard

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the body on rank 0, then on the others: for work whose result rank 0 leaves on disk."""
        if not self.is_rank_zero:
            self.barrier()
        yield
        if self.is_rank_zero:
            self.barrier()

    # ---------------------------------------------------------------- setup

    def setup_model(self, model: nn.Module) -> nn.Module:
        """Shard ``model``, give it its weights and return the module to call.

        The order is fixed: recomputation, compilation per block, sharding, materialising, loading.

        Args:
            model: From ``build_model`` (on the meta device), or any module; a module that already has values keeps
                rank 0's.
        """
        from veomni.models import (
            Materializer,
            derive_plan,
            install_token_loss,
            isolate_documents,
            prepare_towers,
            resolve_attention,
            resolve_experts,
            unwrap,
        )
        from veomni.models.adapter.passes.documents import remember_leak
        from veomni.models.traits import PassesDocuments, complete, examine_model
        from veomni.moe import MoEOptions, install_controller

        half = self.precision.compute is torch.bfloat16
        isolate_documents(model)
        resolve_attention(model, varlen=half and self.accelerator.supports_varlen_attention)
        resolve_experts(model, self.precision, self.accelerator.experts_backends)
        _store_in(model, self.precision.storage)
        self._share_values(model)
        spread = [strategy for strategy in self.strategies if {*strategy.mesh_axes().values()} - {1}]
        traits = examine_model(model, [PassesDocuments, *(trait for each in spread for trait in each.requires)])
        for strategy in spread:
            traits.require(*strategy.requires, by=type(strategy).__name__)
        plan = derive_plan(model)
        group = dist.group.WORLD if self.broadcast_weights else None
        materialize = Materializer(model, device=self._storage_device(), seed=self.seed, group=group)
        self.reporter.describe_model(model, self.accelerator, self.precision, self.world_size)
        token_loss = install_token_loss(model, fused=self.fused_loss)
        dtype = torch.float64 if self.precision.name == "fp64" else torch.float32
        controller = install_controller(model, self.router or MoEOptions(), self.state, self.device, dtype)
        prepare_towers(model)
        for strategy in self.strategies:
            strategy.prepare(model, plan, self.state)
        if self.balance_towers:
            balance_towers(model, self.state.group("loss"))
        apply_recompute(model, plan, self.recompute)
        if self.compile:
            compile_blocks(model, plan, self.precision)
        context = SetupContext(self.state, self.accelerator, self.device, self.precision, plan, materialize)
        ready = self.parameter_strategy.parallelize(model, context)
        traits = complete(traits, ready, unwrap(ready), self.device)
        for strategy in spread:
            traits.require(*strategy.requires, by=type(strategy).__name__)
        remember_leak(unwrap(ready), traits[PassesDocuments].reason if not traits[PassesDocuments].ok else None)
        for strategy in self.strategies:
            strategy.verify(ready, unwrap(ready), context)
        controller.check(ready)
        self._controllers[ready] = controller
        if token_loss is not None:
            self._token_losses[ready] = token_loss
        return ready

    def _storage_device(self) -> torch.device:
        return torch.device("cpu") if getattr(self.parameter_strategy, "cpu_offload", False) else self.device

    def _share_values(self, model: nn.Module) -> None:
        if self.world_size == 1:
            return
        tensors = [tensor.data for tensor in [*model.parameters(), *model.buffers()] if not tensor.is_meta]
        # Sent in buckets of one dtype and device, as DDP sends its own: a message per tensor costs its latency.
        if tensors:
            assert dist.group.WORLD is not None
            dist._broadcast_coalesced(dist.group.WORLD, tensors, _BUCKET_BYTES, 0)  # type: ignore[attr-defined]

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
        from veomni.optim import build_optimizer_groups, combine, members_by_mesh, scale_lr, split_by_lr_scale

        if any(parameter.is_meta for parameter in model.parameters()):
            raise ModelError("the optimizer was built before the model was sharded", "call setup_model first")
        no_decay, lr_scale = options.pop("no_decay", ()), options.pop("lr_scale", {})
        groups = build_optimizer_groups(model, weight_decay=options.get("weight_decay", 0.0), no_decay=no_decay)
        groups = split_by_lr_scale(model, groups, lr_scale)
        return scale_lr(combine(members_by_mesh(groups, lambda part: factory(part, **options))))

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

    def track(self, loader: Iterable[Sequence[Any]], *, max_steps: int | None = None) -> Iterator[StepBatch]:
        """Yield one optimizer step at a time until the data or ``max_steps`` ends; show progress on rank 0.

        A rank without a batch ends the loop on all ranks. A signal to any rank ends it on all of them, after the step
        in hand has been saved by :meth:`checkpoint`; the process then exits with 75.

        Args:
            loader: Yields this data rank's micro-batches of a step.
            max_steps: The last step of the whole run, counted from 1.
        """
        check_loader(loader)
        total = max_steps if max_steps is not None else _length(loader, self.step)
        self.reporter.start(self.step, total)
        iterator = iter(loader)
        while total is None or self.step < total:
            self.reporter.begin_step()
            micro_batches = next(iterator, None)
            drained = (
                micro_batches is not None
                and not _has_document(micro_batches)
                and bool(getattr(loader, "exhausted", False))
            )
            batch = self._next_batch(micro_batches, total, drained)
            if batch is None:
                self.checkpoints.last = True  # the data has ended: what is saved now is final
                self.reporter.end_loop()
                break
            self.reporter.mark("data")
            yield batch
            if self.checkpoints.stopping:
                self._exit_preempted()

    def _next_batch(
        self, micro_batches: Sequence[Any] | None, total: int | None, drained: bool = False
    ) -> StepBatch | None:
        assert self._stop is not None, "call launch() before track()"
        mine = [self._shard(micro) for micro in micro_batches or ()]
        agreed = agree(
            has_batch=micro_batches is not None,
            loss_weight=sum(token_weight(micro) for micro in mine),
            stop=self._stop.requested,
            work=self.reporter.measure(mine),
            parts=summed_parts(component_tokens(micro.inputs) for micro in mine),
            drained=drained,
        )
        if agreed.ranks_drained == self.world_size:
            return None
        if agreed.ranks_with_batch < self.world_size:
            if agreed.ranks_with_batch:
                logger.warning_rank0("the data ended unevenly: %s of %s ranks had a batch that nobody trained on",
                                     agreed.ranks_with_batch, self.world_size)  # fmt: skip
            return None
        self.step += 1
        self.checkpoints.stopping = agreed.stop
        self.checkpoints.last = self.step == total
        copies = self.state.size("sequence")  # ranks that share rows count the work of whole rows, each of them
        work = StepWork(*(amount / copies for amount in astuple(agreed.work)))
        zero = torch.zeros((), device=self.device)
        self._batch = StepBatch(mine, agreed.loss_weight, work, self.step, zero, agreed.parts)
        return self._batch

    def accumulate(self, model: nn.Module, batch: StepBatch) -> Iterator[MicroBatch]:
        """Yield the step's micro-batches on the device; gradients are exchanged in the last one's backward only."""
        self._controller = self._controllers.get(model)
        if self._controller is not None:
            self._begin_routing(self._controller, model, batch)
        for index, held in enumerate(batch.micro_batches):
            last = index == len(batch.micro_batches) - 1
            micro = replace(held.to(self.device), weight=token_weight(held), last=last)
            watch = nullcontext() if self._controller is None else self._controller.micro_batch(held)
            with self.parameter_strategy.grad_sync(model, last), watch, self._telling_loss(model, micro) as told:
                yield micro
            if told.by_source is not None:
                sums, before = told.by_source.sums, batch.source_sums
                batch.source_sums = sums if before is None else before + sums
        self.reporter.mark("compute")

    @contextmanager
    def _telling_loss(self, model: nn.Module, micro: MicroBatch) -> Iterator[LossContext]:
        """Let the loss know, while the body computes it, what the model does not pass on to it."""
        from veomni.models import LossContext

        loss = self._token_losses.get(model)
        if loss is None:
            if micro.targets.loss_weights is not None:
                problem = f"the batch has loss_weights, and {type(model).__name__} takes its loss by itself"
                raise ModelError(problem, "leave the weights out of the data, or give each token 0 or 1")
            yield LossContext()
            return
        loss.context = LossContext.of(micro)
        try:
            yield loss.context
        finally:
            loss.context = LossContext()

    def _begin_routing(self, controller: RouterController, model: nn.Module, batch: StepBatch) -> None:
        controller.begin_step(batch.work.tokens, len(batch.micro_batches))
        if controller.counts_first:
            with same_draws_after(self.accelerator):
                controller.count_first(batch.micro_batches, lambda held: forward(model, held.to(self.device)))

    def _shard(self, batch: Any) -> MicroBatch:
        micro = MicroBatch.of(batch)
        for strategy in self.strategies:
            micro = strategy.shard(micro, self.state)
        return micro

    def backward(self, loss: Tensor | Mapping[str, Tensor], micro: MicroBatch) -> None:
        """Add this micro-batch's gradients.

        Args:
            loss: The mean over the micro-batch's supervised tokens, by their weights if there are any (over its rows,
                for a batch without labels). Of a composed model its ``losses`` by part, each the mean over its own
                tokens: "text", then its decoders.
            micro: What the loss was computed on.

        Gradients after the last backward are those of the mean over all supervised tokens of the step, ``sum(weight *
        loss) / sum(weight)`` with weights of 1 unless data give others, whatever the layout: strategies average over
        the ``loss`` view, so each part is weighed by its share of the weights times the size of that view. Losses by
        part are each such a mean, and their sum is what is learned.

        The losses of routers add their gradients here, and with the last backward the step of the routers ends, before
        any parameter changes: no loop does without this call.

        Raises:
            NonFiniteError: logits of a router are not finite; raised on all ranks.
        """
        assert self._batch is not None, "call backward inside track() and accumulate()"
        if self._controller is not None:
            self._controller.before_backward()
        shared = shared_loss(loss, micro, self._batch)
        self._batch.loss = self._batch.loss + shared.detach()
        (shared * self.state.size("loss")).backward()
        if self._controller is not None and micro.last:
            self._controller.end_step()

    def global_losses(self, batch: StepBatch) -> dict[str, Tensor]:
        """Return the mean loss of every part over its tokens of the step, equal on all ranks; to be logged by name."""
        return part_losses(batch, self.state)

    def source_metrics(self, batch: StepBatch) -> dict[str, float | int | None]:
        """Return what a mixture's sources have in the step, equal on all ranks; nothing for other data.

        For each source, by its name: ``source_loss/NAME``, the (weighted) mean over its supervised tokens (None without
        any); ``source_samples/NAME`` and ``source_tokens/NAME``, its documents and their tokens, learned or not.
        """
        return source_metrics(batch, self.state)

    def global_loss(self, batch: StepBatch) -> Tensor:
        """Return the (weighted) mean over all supervised tokens of the step, equal on all ranks."""
        loss = batch.loss.clone()
        dist.all_reduce(loss, group=self.state.group("loss"))
        return loss

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale gradients to a norm of at most ``max_norm`` and return the norm they had.

        Raises:
            NonFiniteError: the norm is not finite; raised on all ranks, before any parameter changes.
        """
        from veomni.strategies.grad_norm import clip_gradients

        norm = self.parameter_strategy.grad_norm(model)
        clip_gradients(model.parameters(), norm, max_norm)
        return norm

    # ---------------------------------------------------------------- between steps

    def log(self, metrics: Mapping[str, float | int | Tensor | None]) -> None:
        """Report numbers of the step in hand: the progress bar, ``metrics.jsonl`` and the other loggers."""
        assert self._batch is not None, "call log inside track()"
        routing = {} if self._controller is None else self._controller.metrics()
        self.reporter.report({**metrics, **routing}, self._batch)
        load = None if self._controller is None else self._controller.load_due(self._batch.index)
        if load is not None:
            self.reporter.report_expert_load(load, self._batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loader: Iterable[Sequence[Any]], *, answers: bool = False) -> dict[str, float]:
        """Return ``eval_loss`` and ``perplexity`` over a held-out loader, each token once, equal on all ranks.

        Of a mixture, also ``eval_loss/NAME`` for each source; of a composed model, ``eval_loss_NAME`` for each decoder.

        Args:
            model: What :meth:`setup_model` returned.
            loader: A loader that gives every rank the same number of micro-batches.
            answers: Also return ``eval_accuracy``, the share of documents whose answers are right to the last token
                (:class:`veomni.metrics.AnswerAccuracy`), and of a mixture ``eval_accuracy/NAME``.

        Raises:
            ModelError: answers are asked for, and the model takes its loss by itself.
        """
        total = Evaluation(self.state, self.sequence_shard, self.device, answers=answers)
        training = model.training
        self.reporter.mark("optimizer")
        model.eval()
        for micro_batches in loader:
            for raw in micro_batches:
                held = self._shard(raw)
                micro = held.to(self.device)
                with self._telling_loss(model, micro) as told:
                    told.predicts = answers
                    output = forward(model, micro)
                total.add(held, output, told)
        model.train(training)
        found = total.compute()
        self.reporter.mark("evaluation")
        return found

    def checkpoint(self, state: Mapping[str, Any]) -> None:
        """Save ``state`` when it is due: every N steps, after a signal, and at the end."""
        self.checkpoints.save_if_due({**state, "rng": RandomState(self.accelerator)}, self.step)

    def resume(self, state: Mapping[str, Any]) -> int:
        """Load the checkpoint to continue from into ``state`` and return its step; 0 when there is none."""
        self.step = self.checkpoints.resume({**state, "rng": RandomState(self.accelerator)})
        self.reporter.resume_from(self.step)
        warn_unsaved_loader(state, self.step)
        return self.step

    def export(self, model: nn.Module, output_dir: Path | str, *, tokenizer: Any = None) -> Path:
        """Write the model in Hugging Face layout, one parameter at a time; collective."""
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


def forward(model: nn.Module, micro: MicroBatch) -> Any:
    """Return what a model makes of a micro-batch."""
    return model(*micro.args, **micro.inputs)


def _has_document(micro_batches: Sequence[Any]) -> bool:
    return any(MicroBatch.of(micro).rows.document_lengths for micro in micro_batches)


def _store_in(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _length(loader: Any, done: int) -> int | None:
    remaining = getattr(loader, "remaining_steps", None)
    if remaining is not None:
        return done + int(remaining)
    return done + len(loader) if hasattr(loader, "__len__") else None


__all__ = ["DataParallel", "Launcher"]
