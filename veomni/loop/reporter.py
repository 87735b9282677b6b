"""Reports of a run: header, progress, ``metrics.jsonl`` and other loggers, times and FLOPs, plot and summary."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor, nn

from veomni.accelerators import Accelerator
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import LoopError
from veomni.loggers import JsonlLogger, Logger, LoggerGroup
from veomni.logging import create_logger, current_rank
from veomni.loop.profile import Profile
from veomni.loop.step import Step
from veomni.metrics import FlopsCounter, Progress, StepFlops, Throughput, plot_expert_load, plot_loss
from veomni.moe import ExpertLoad
from veomni.strategies.transforms.precision import Precision

logger = create_logger(__name__)


class Reporter:
    """What is shown and drawn besides metrics.jsonl, which is always written; on rank 0 only.

    Args:
        output_dir: Where ``metrics.jsonl`` and ``loss.png`` go; None writes neither.
        loggers: Further loggers (wandb, TensorBoard).
        progress_bar: Show loss, speed and time left on a terminal, plain lines elsewhere.
        log_every: Steps between reports; evaluations are always reported.
        plot: Draw <output_dir>/loss.png at the end, and expert_load.png of a mixture of experts.
        config: The run's configuration, for the loggers that keep one; secrets are redacted there.
        profile: Which steps are traced, into ``<output_dir>/profile``, on the ranks that it names; None is
            ``Profile()``, which acts on a signal.
    """

    def __init__(
        self,
        output_dir: Path | str | None = None,
        *,
        loggers: Sequence[Logger] = (),
        progress_bar: bool = True,
        log_every: Annotated[int, Ge(1)] = 1,
        plot: bool = True,
        config: Mapping[str, Any] | None = None,
        profile: Profile | None = None,
    ) -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.progress_bar, self.log_every, self.plot, self.config = progress_bar, log_every, plot, config
        used = [*([] if self.output_dir is None else [JsonlLogger(self.output_dir)]), *loggers]
        self._loggers, self._active = LoggerGroup(used), bool(used) or progress_bar
        self.clock, self.profile = Throughput(), profile or Profile()
        self.step: Step | None = None
        self._flops: FlopsCounter | None = None
        self._progress: Progress | None = None
        self._model = ""
        self._started = 0.0
        self._latest: dict[str, float | int | None] = {}

    def describe_model(self, model: nn.Module, accelerator: Accelerator, precision: Precision, world_size: int) -> None:
        """Count the parameters and FLOPs of the unsharded model, and look up the device's peak."""
        if not self._active:
            return
        self._model, self._flops = _description(model), FlopsCounter.from_model(model)
        peak = accelerator.peak_flops(precision.compute)
        peak_flops = None if peak is None else peak * world_size
        self.clock = Throughput(peak_flops=peak_flops, peak_memory=accelerator.peak_memory)
        accelerator.reset_peak_memory()

    def measure(self, micro_batches: Sequence[MicroBatch]) -> StepFlops:
        """Return the FLOPs of this rank's micro-batches; 0 if not known."""
        if self._flops is None:
            return StepFlops(0.0, 0.0)
        lengths = [length for micro in micro_batches for length in micro.rows.document_lengths]
        return self._flops.step_flops(lengths, [micro.inputs for micro in micro_batches])

    def resume_from(self, step: int) -> None:
        """Drop what was reported past ``step``; those steps are taken again."""
        self._loggers.each(lambda each: each.truncate_after(step))

    def start_step(self, step: int) -> None:
        """Start the clock, and the trace, of a step."""
        self.profile.start_step(step)
        self.clock.start_step()

    def start(self, step: int, total: int | None) -> None:
        """Write the header and show progress from ``step`` towards ``total``."""
        self._started, config = time.perf_counter(), self.config
        if config is not None:
            self._loggers.each(lambda each: each.log_config(config))
        if self.progress_bar:
            place = "" if self.output_dir is None else f"; output in {self.output_dir}"
            end = "the end of the data" if total is None else total
            logger.info_rank0("%s; steps %s to %s%s", self._model, step + 1, end, place)
            self._progress = Progress(total, step)

    def report(self, metrics: Mapping[str, float | int | Tensor | None]) -> None:
        """Send the numbers of the current step, which must be complete, to the progress bar and the loggers."""
        step = self.step
        if step is None:
            raise LoopError("log() was called before the first step", "call it inside the loop over launcher.track")
        step.check_complete()
        if not self._active:
            return
        for load in step.expert_loads():
            self._report_load(load, step.index)
        evaluated = any(name.startswith("eval_") for name in metrics)
        if step.index % self.log_every and not evaluated:
            return
        given = {**metrics, **step.routing()}
        numbers = {name: value.item() if isinstance(value, Tensor) else value for name, value in given.items()}
        totals, unit = step.totals, "tokens" if step.totals["tokens"] else "samples"
        flops = None if self._flops is None else StepFlops(totals["flops_causal"], totals["flops_full"])
        numbers |= self.clock.end_step(int(totals[unit]), flops, unit)
        if self._progress is not None:
            self._progress.update(step.index, numbers)
        self._latest |= {"step": step.index, **numbers}
        self._loggers.each(lambda each: each.log(numbers, step.index))

    def _report_load(self, load: ExpertLoad, step: int) -> None:
        tokens = {name: sent.tolist() for name, sent in zip(load.names, load.assignments, strict=True)}
        self._loggers.each(lambda each: each.log_expert_load(tokens, step))

    def end_loop(self) -> None:
        """Close the bar: the loop is over, and what is printed from here on goes below it."""
        if self._progress is not None:
            self._progress.close()

    def close(self, status: str) -> None:
        """Close bar, profile and loggers; when the run is finished, draw the plots and write the summary."""
        self.end_loop()
        self.profile.close()
        self._loggers.each(lambda each: each.finalize(status))
        if status == "finished" and current_rank() == 0:
            if self.plot and self.output_dir is not None:
                _draw(self.output_dir)
            if self._progress is not None:
                self._summarize()
        self._progress = None

    def _summarize(self) -> None:
        found = [("loss", "loss"), ("eval_loss", "evaluation loss")]
        losses = [f"{text} {self._latest[name]:.4f}" for name, text in found if self._latest.get(name) is not None]
        minutes, seconds = divmod(round(time.perf_counter() - self._started), 60)
        time_taken, step = f"{minutes} min {seconds} s", self._latest.get("step")
        logger.info_rank0("finished step %s in %s: %s", step, time_taken, ", ".join(losses))
        if self.output_dir is not None:
            written = sorted(path.name for path in self.output_dir.iterdir() if not path.name.startswith("."))
            logger.info_rank0("in %s: %s", self.output_dir, ", ".join(written))


def _draw(output_dir: Path) -> None:
    """Draw what was logged; a loop need not log."""
    for name, plot, out in (("metrics", plot_loss, "loss"), ("expert_load", plot_expert_load, "expert_load")):
        lines = output_dir / f"{name}.jsonl"
        if lines.exists():
            plot(lines, output_dir / f"{out}.png")


def _description(model: nn.Module) -> str:
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = f", {_millions(trained)} trained" if trained < total else ""
    return f"{type(model).__name__}, {_millions(total)} parameters{frozen}"


def _millions(count: int) -> str:
    return f"{count:,}" if count < 1e5 else f"{count / 1e6:,.1f} M"
