"""Progress of a run on rank 0: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from veomni.logging import current_rank

if TYPE_CHECKING:
    from tqdm import tqdm

_BAR = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left{postfix}"
_COUNT = "step {n_fmt}, {elapsed} elapsed{postfix}"
_LINES = 10
_WIDTH = 80


class Progress:
    """Show step, loss, speed and time left.

    Lines are written at the first step, at every tenth of the run (every 10 steps of a run without known end) and at
    the last step. While a bar is shown, what ``veomni``'s loggers write to the same terminal goes above it.

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
        self._start = time.perf_counter()
        self._bar: tqdm[Any] | None = None
        self._redirected: list[logging.StreamHandler[Any]] = []
        if self._enabled and self._stream.isatty():
            self._show_bar()

    def update(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Show that ``step`` is done.

        Args:
            step: Counted from 1 over the whole run.
            metrics: ``loss``, ``tokens_per_second`` and ``mfu_causal`` are shown where they are given, None as n/a.
        """
        if not self._enabled:
            return
        text = _describe(metrics)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._interval == 0 or step in (self._initial + 1, self._total):
            self._stream.write(f"{self._position(step)}, {text}{self._time_left(step)}\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        for handler in self._redirected:
            handler.setStream(self._stream)
        self._redirected = []
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show_bar(self) -> None:
        from tqdm import tqdm

        layout = _COUNT if self._total is None else _BAR
        self._bar = tqdm(
            total=self._total, initial=self._initial, file=self._stream, bar_format=layout,
            dynamic_ncols=_knows_its_width(self._stream),
            ncols=_WIDTH,
        )  # fmt: skip
        for handler in logging.getLogger("veomni").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._stream:
                handler.setStream(_AboveBar(self._stream))
                self._redirected.append(handler)

    def _position(self, step: int) -> str:
        return f"step {step}" if self._total is None else f"step {step}/{self._total} ({step / self._total:.0%})"

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


def _knows_its_width(stream: TextIO) -> bool:
    """Whether a terminal says how wide it is; one that says 0 would be shown an empty bar."""
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _describe(metrics: Mapping[str, float | int | None]) -> str:
    shown = (("loss", "loss {}", ".4f"), ("tokens_per_second", "{} tokens/s", ",.0f"), ("mfu_causal", "mfu {}", ".1%"))
    return ", ".join(
        text.format("n/a" if metrics[name] is None else format(metrics[name], form))
        for name, text, form in shown
        if name in metrics
    )
