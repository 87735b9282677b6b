"""Progress of a run on rank 0: a bar on a terminal, a line now and then anywhere else."""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, TextIO

from tqdm import tqdm

from veomni.logging import current_rank

_BAR = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left{postfix}"
_COUNT = "step {n_fmt}, {elapsed} elapsed{postfix}"
_LINES = 10
_WIDTH = 80
_MEASURED = frozenset(
    (
        "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "samples", "samples_per_second",
        "mfu_causal", "mfu_full", "peak_memory_gib", "perplexity", "aux_loss", "z_loss",
    )
)  # fmt: skip
_MEASURED_PREFIXES = ("loss_", "eval_loss", "source_", "expert_load_")

Numbers = Mapping[str, float | int | None]


def extra_metrics(names: Iterable[str]) -> list[str]:
    """Return the names that a loop added, in order: ``accuracy`` and ``eval_accuracy``, not ``data_seconds``."""
    own = (name for name in names if name not in _MEASURED and not name.startswith(_MEASURED_PREFIXES))
    return [name for name in own if not name.endswith("_seconds")]


class Progress:
    """Show step, loss, speed, time left, and every evaluation; on rank 0.

    Lines are written at the first step, at every tenth of the run (every 10 steps of a run without known end) and at
    the last step; the speed is that of the steps since the line before. While a bar is shown, what ``veomni``'s loggers
    write to the same terminal goes above it. The last step, ``total``, closes it; None is not known.
    """

    def __init__(self, total: int | None, initial: int = 0, *, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._total, self._initial = total, initial
        self._interval = max(1, total // _LINES) if total is not None else _LINES
        self._recent: deque[Numbers] = deque(maxlen=self._interval)
        self._start = time.perf_counter()
        self._bar: tqdm[Any] | None = None
        self._redirected = ExitStack()
        if current_rank() == 0 and self._stream.isatty():
            self._show_bar()

    def _show_bar(self) -> None:
        self._bar = tqdm(
            total=self._total, initial=self._initial, file=self._stream, dynamic_ncols=_has_width(self._stream),
            bar_format=_COUNT if self._total is None else _BAR, ncols=_WIDTH,
        )  # fmt: skip
        for handler in logging.getLogger("veomni").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._stream:
                before = handler.setStream(_AboveBar(self._stream))
                self._redirected.callback(handler.setStream, before)

    def update(self, step: int, metrics: Numbers) -> None:
        """Show that ``step`` is done: its loss, speed, MFU and the loop's own metrics; an evaluation's on a line."""
        if current_rank() != 0:
            return
        self._recent.append(metrics)
        own = ["loss", *(name for name in extra_metrics(metrics) if not name.startswith("eval_"))]
        text = ", ".join([*_values(metrics, own), *self._speed()])
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._interval == 0 or step in (self._initial + 1, self._total):
            place = f"step {step}" if self._total is None else f"step {step}/{self._total} ({step / self._total:.0%})"
            self._write(f"{place}, {text}{self._time_left(step)}")
        evaluated = {name.removeprefix("eval_"): metrics[name] for name in metrics if name.startswith("eval_")}
        if shown := _values(evaluated, evaluated):
            self._write(f"step {step}, evaluation: {', '.join(shown)}")
        if step == self._total:
            self.close()

    def close(self) -> None:
        """Leave the bar in its last state and give the terminal back."""
        self._redirected.close()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, line: str) -> None:
        _AboveBar(self._stream).write(f"{line}\n")
        self._stream.flush()

    def _speed(self) -> list[str]:
        """Return tokens or samples per second over the latest steps, without the time of evaluations, and MFU."""
        timed = [metrics for metrics in self._recent if metrics.get("step_seconds")]
        seconds = sum(metrics["step_seconds"] or 0.0 for metrics in timed)
        amounts = {unit: sum(metrics.get(unit) or 0 for metrics in timed) for unit in ("tokens", "samples")}
        shown = [f"{amount / seconds:,.0f} {unit}/s" for unit, amount in amounts.items() if amount][:1]
        share = self._recent[-1].get("mfu_causal")
        return shown if share is None else [*shown, f"mfu {share:.1%}"]

    def _time_left(self, step: int) -> str:
        if self._total is None or step >= self._total:
            return ""
        per_step = (time.perf_counter() - self._start) / (step - self._initial)
        return f", {tqdm.format_interval(per_step * (self._total - step))} left"


class _AboveBar:
    """A stream that clears the bar, writes, and draws the bar again."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.flush = stream.flush

    def write(self, text: str) -> int:
        with tqdm.external_write_mode(file=self._stream):
            return self._stream.write(text)


def _values(metrics: Numbers, names: Iterable[str]) -> list[str]:
    known = ((name, metrics.get(name)) for name in names)
    return [f"{name} {value:.4f}" for name, value in known if value is not None]


def _has_width(stream: TextIO) -> bool:
    """Whether the terminal reports its width; one that reports 0 would get an empty bar."""
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False
