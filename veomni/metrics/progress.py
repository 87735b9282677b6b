"""Progress of a run on rank 0: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from veomni.logging import current_rank
from veomni.metrics.names import extra_metrics

if TYPE_CHECKING:
    from tqdm import tqdm

_BAR = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left{postfix}"
_COUNT = "step {n_fmt}, {elapsed} elapsed{postfix}"
_LINES = 10
_WIDTH = 80
_UNITS = ("tokens", "samples")

Numbers = Mapping[str, float | int | None]


class Progress:
    """Show step, loss, speed, time left, and every evaluation.

    Lines are written at the first step, at every tenth of the run (every 10 steps of a run without known end) and at
    the last step; the speed is that of the steps since the line before. While a bar is shown, what ``veomni``'s loggers
    write to the same terminal goes above it. The last step closes it.

    Args:
        total: The last step of the run; None when the data decides.
        initial: Steps done before.
        enabled: False shows nothing.
        stream: Where to show it; None is standard error.
    """

    def __init__(
        self, total: int | None, initial: int = 0, *, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled and current_rank() == 0
        self._total, self._initial = total, initial
        self._interval = max(1, total // _LINES) if total is not None else _LINES
        self._recent: deque[Numbers] = deque(maxlen=self._interval)
        self._start = time.perf_counter()
        self._bar: tqdm[Any] | None = None
        self._redirected: list[logging.StreamHandler[Any]] = []
        if self._enabled and self._stream.isatty():
            self._show_bar()

    def update(self, step: int, metrics: Numbers) -> None:
        """Show that ``step`` is done.

        Args:
            step: Counted from 1 over the whole run.
            metrics: What is shown where it is given and known: ``loss``, ``tokens`` or ``samples`` with
                ``step_seconds``, ``mfu_causal``, metrics of the loop's own; and those of an evaluation, on a line.
        """
        if not self._enabled:
            return
        self._recent.append(metrics)
        text = ", ".join([*_training(metrics), *self._speed(), *_utilization(metrics)])
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._interval == 0 or step in (self._initial + 1, self._total):
            self._write(f"{self._position(step)}, {text}{self._time_left(step)}")
        evaluated = ", ".join(_evaluation(metrics))
        if evaluated:
            self._write(f"step {step}, evaluation: {evaluated}")
        if step == self._total:
            self.close()

    def close(self) -> None:
        """Leave the bar in its last state and give the terminal back."""
        for handler in self._redirected:
            handler.setStream(self._stream)
        self._redirected = []
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, line: str) -> None:
        """Write a line, above the bar if there is one."""
        stream = self._stream if self._bar is None else _AboveBar(self._stream)
        stream.write(f"{line}\n")
        stream.flush()

    def _show_bar(self) -> None:
        from tqdm import tqdm

        layout = _COUNT if self._total is None else _BAR
        self._bar = tqdm(
            total=self._total, initial=self._initial, file=self._stream, bar_format=layout,
            dynamic_ncols=_has_width(self._stream), ncols=_WIDTH,
        )  # fmt: skip
        for handler in logging.getLogger("veomni").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._stream:
                handler.setStream(_AboveBar(self._stream))
                self._redirected.append(handler)

    def _position(self, step: int) -> str:
        return f"step {step}" if self._total is None else f"step {step}/{self._total} ({step / self._total:.0%})"

    def _speed(self) -> list[str]:
        """Return tokens or samples per second over the latest steps, without the time of evaluations."""
        timed = [metrics for metrics in self._recent if metrics.get("step_seconds")]
        seconds = sum(metrics["step_seconds"] or 0.0 for metrics in timed)
        for unit in _UNITS:
            amount = sum(metrics.get(unit) or 0 for metrics in timed)
            if amount:
                return [f"{amount / seconds:,.0f} {unit}/s"]
        return []

    def _time_left(self, step: int) -> str:
        if self._total is None or step >= self._total:
            return ""
        from tqdm import tqdm

        per_step = (time.perf_counter() - self._start) / (step - self._initial)
        return f", {tqdm.format_interval(per_step * (self._total - step))} left"


class _AboveBar:
    """A stream that clears the bar, writes, and draws the bar again."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self._stream):
            return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


def _has_width(stream: TextIO) -> bool:
    """Whether the terminal reports its width; one that reports 0 would get an empty bar."""
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _training(metrics: Numbers) -> list[str]:
    names = ["loss", *(name for name in extra_metrics(metrics) if not name.startswith("eval_"))]
    return [f"{name} {metrics[name]:.4f}" for name in names if metrics.get(name) is not None]


def _evaluation(metrics: Numbers) -> list[str]:
    found = {name.removeprefix("eval_"): metrics[name] for name in metrics if name.startswith("eval_")}
    return [f"{name} {value:.4f}" for name, value in found.items() if value is not None]


def _utilization(metrics: Numbers) -> list[str]:
    share = metrics.get("mfu_causal")
    return [] if share is None else [f"mfu {share:.1%}"]
