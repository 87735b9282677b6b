"""Reports of a run: header, progress, ``metrics.jsonl`` and other loggers, times and FLOPs, plot and summary."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veomni.accelerators import Accelerator
from veomni.batch.micro_batch import MicroBatch
from veomni.logging import create_logger, current_rank

if TYPE_CHECKING:
    from veomni.loggers import JsonLines, Logger, LoggerGroup
    from veomni.loop.step import Step
    from veomni.loop.sync import StepTotals
    from veomni.metrics import FlopsCounter, Progress, Throughput
    from veomni.moe import ExpertLoad
    from veomni.strategies.transforms.precision import Precision

logger = create_logger(__name__)


class Reporter:
    """Report the numbers of a step; files, bars and messages on rank 0 only.

    Args:
        output_dir: Where ``metrics.jsonl`` and ``loss.png`` go; None writes neither.
        loggers: Further loggers (wandb, TensorBoard).
        progress_bar: Show a bar on a terminal, plain lines elsewhere; a header before, a summary after.
        log_every: Report every so many steps, and every evaluation.
        plot: Draw ``loss.png``, and ``expert_load.png`` of a mixture of experts, when the run ends.
        config: The run's configuration, for the loggers that keep one; secrets are redacted there.
    """

    def __init__(
        self,
        output_dir: Path | str | None = None,
        *,
        loggers: Sequence[Logger] = (),
        progress_bar: bool = False,
        log_every: int = 1,
        plot: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.log_every, self.plot = log_every, plot
        self._progress_bar, self._config = progress_bar, config
        self._extra_loggers = list(loggers)
        self._group: LoggerGroup | None = None
        self._expert_load: JsonLines | None = None
        self._flops: FlopsCounter | None = None
        self._throughput: Throughput | None = None
        self._progress: Progress | None = None
        self._model = ""
        self._started = 0.0
        self._latest: dict[str, float | int | None] = {}

    @property
    def _active(self) -> bool:
        return self.output_dir is not None or bool(self._extra_loggers) or self._progress_bar

    def describe_model(self, model: nn.Module, accelerator: Accelerator, precision: Precision, world_size: int) -> None:
        """Count the parameters and FLOPs of the unsharded model, and look up the device's peak."""
        if not self._active:
            return
        from veomni.metrics import FlopsCounter, Throughput

        self._model = _description(model)
        self._flops = FlopsCounter.from_model(model)
        self._throughput = Throughput(
            peak_flops=accelerator.peak_flops(precision.compute),
            world_size=world_size,
            peak_memory=accelerator.peak_memory,
        )
        accelerator.reset_peak_memory()

    def measure(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, float]:
        """Return the FLOPs of this rank's micro-batches, with causal attention and with full; 0 if not known."""
        if self._flops is None:
            return 0.0, 0.0
        flops = self._flops.step_flops([length for micro in micro_batches for length in micro.rows.document_lengths])
        return flops.causal, flops.full

    def resume_from(self, step: int) -> None:
        """Drop what was reported past ``step``; those steps are taken again."""
        self._logger_group().truncate_after(step)
        if self._writes:
            self._expert_load_lines().truncate_after(step)

    def start(self, step: int, total: int | None) -> None:
        """Write the header and show progress from ``step`` towards ``total``."""
        self._started = time.perf_counter()
        if self._config is not None:
            self._logger_group().log_config(self._config)
        if self._progress_bar:
            from veomni.metrics import Progress

            place = "" if self.output_dir is None else f"; output in {self.output_dir}"
            end = "the end of the data" if total is None else total
            logger.info_rank0("%s; steps %s to %s%s", self._model, step + 1, end, place)
            self._progress = Progress(total, step)

    def begin_step(self) -> None:
        """Start the clock of a step: what comes first is waiting for data."""
        if self._throughput is not None:
            self._throughput.start_step()

    def mark(self, section: str) -> None:
        """End a section of the step on the clock ("data", "compute")."""
        if self._throughput is not None:
            self._throughput.mark(section)

    def report(self, metrics: Mapping[str, float | int | Tensor | None], step: Step) -> None:
        """Send the numbers of a step to the progress bar and the loggers."""
        evaluated = any(name.startswith("eval_") for name in metrics)
        if not self._active or (step.index % self.log_every and not evaluated):
            return
        numbers = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        numbers |= self._timing(step.totals)
        if self._progress is not None:
            self._progress.update(step.index, numbers)
        self._latest |= {"step": step.index, **numbers}
        self._logger_group().log(numbers, step.index)

    def report_expert_load(self, load: ExpertLoad, step: Step) -> None:
        """Write the number of tokens dispatched to every expert in a step, a line of ``expert_load.jsonl``."""
        if self._writes:
            counts = {name: sent.tolist() for name, sent in zip(load.names, load.assignments, strict=True)}
            self._expert_load_lines().append({"step": step.index, "tokens_per_expert": counts})

    @property
    def _writes(self) -> bool:
        return self.output_dir is not None and current_rank() == 0

    def _expert_load_lines(self) -> JsonLines:
        if self._expert_load is None:
            from veomni.loggers import JsonLines

            assert self.output_dir is not None
            self._expert_load = JsonLines(self.output_dir / "expert_load.jsonl")
        return self._expert_load

    def _timing(self, totals: StepTotals) -> dict[str, float | int | None]:
        tokens, samples = int(totals.tokens), int(totals.samples)
        if self._throughput is None:
            return {"tokens": tokens} if tokens else {"samples": samples}
        from veomni.metrics import StepFlops

        flops = StepFlops(totals.flops_causal, totals.flops_full) if self._flops is not None else None
        numbers = self._throughput.end_step(tokens, flops)
        if not tokens:  # rows of something else
            seconds = numbers["step_seconds"] or 1.0
            numbers |= {"tokens": None, "tokens_per_second": None}
            numbers |= {"samples": samples, "samples_per_second": samples / seconds}
        return numbers

    def end_loop(self) -> None:
        """Close the bar: the loop is over, and what is printed from here on goes below it."""
        if self._progress is not None:
            self._progress.close()

    def close(self, status: str) -> None:
        """Close the bar and the loggers; when the run is finished, draw the plot and write the summary."""
        self.end_loop()
        self._logger_group().finalize(status)
        self._group = None
        if self._expert_load is not None:
            self._expert_load.close()
        if self.plot and self._writes and status == "finished":
            self._draw()
        if self._progress is not None and status == "finished":
            self._summarize()
        self._progress = None

    def _summarize(self) -> None:
        found = [("loss", "loss"), ("eval_loss", "evaluation loss")]
        losses = [f"{text} {self._latest[name]:.4f}" for name, text in found if self._latest.get(name) is not None]
        minutes, seconds = divmod(round(time.perf_counter() - self._started), 60)
        logger.info_rank0("finished step %s in %s min %s s: %s", self._latest.get("step"), minutes, seconds,
                          ", ".join(losses))  # fmt: skip
        if self.output_dir is not None:
            written = sorted(path.name for path in self.output_dir.iterdir() if not path.name.startswith("."))
            logger.info_rank0("in %s: %s", self.output_dir, ", ".join(written))

    def _draw(self) -> None:
        from veomni.metrics import plot_expert_load, plot_loss

        assert self.output_dir is not None
        metrics = self.output_dir / "metrics.jsonl"
        if metrics.exists():  # a loop need not log
            plot_loss(metrics, self.output_dir / "loss.png")
        expert_load = self.output_dir / "expert_load.jsonl"
        if expert_load.exists():
            plot_expert_load(expert_load, self.output_dir / "expert_load.png")

    def _logger_group(self) -> LoggerGroup:
        if self._group is None:
            from veomni.loggers import JsonlLogger, LoggerGroup

            own = [] if self.output_dir is None else [JsonlLogger(self.output_dir)]
            self._group = LoggerGroup([*own, *self._extra_loggers])
        return self._group


def _description(model: nn.Module) -> str:
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = f", {_millions(trained)} trained" if trained < total else ""
    return f"{type(model).__name__}, {_millions(total)} parameters{frozen}"


def _millions(count: int) -> str:
    return f"{count:,}" if count < 1e5 else f"{count / 1e6:,.1f} M"
