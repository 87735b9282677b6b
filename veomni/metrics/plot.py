"""A plot of a run: the loss in training and evaluation, below it the loop's own metrics and the gradient norm."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veomni.metrics.names import extra_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = tuple[list[int], list[float]]
_SMOOTH_FROM = 200
_EXTRA_COLORS = ("tab:purple", "tab:orange", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")


def plot_loss(metrics_jsonl: Path, out: Path) -> None:
    """Draw ``loss``, ``eval_loss``, ``grad_norm`` and the metrics that the loop added, over ``step``.

    Args:
        metrics_jsonl: A line of JSON per step; values that are null or missing, and a torn last line, are left
            out.
        out: The image to write; its suffix chooses the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(step_lines(metrics_jsonl))
    extra = _extra(rows)
    figure = Figure(figsize=(9, 8 if extra else 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Sequence[Axes] = figure.subplots(
        3 if extra else 2, 1, sharex=True, height_ratios=(2, 1, 1)[: 2 + bool(extra)]
    )
    _draw_loss(panels[0], rows)
    for name, color in zip(extra, _EXTRA_COLORS, strict=False):
        _draw_line(panels[1], _points(rows, name), name, color)
    _draw_line(panels[-1], _points(rows, "grad_norm"), "gradient norm", "tab:green")
    panels[-1].set_ylabel("gradient norm")
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:-1]:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(out, dpi=120)


def step_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file of JSON lines, without what a killed process left of its last one."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def _extra(rows: list[dict[str, Any]]) -> list[str]:
    """Return the names of the loop's own metrics that have a value, in order."""
    return extra_metrics(dict.fromkeys(name for row in rows for name in row if row[name] is not None))


def _draw_loss(axes: Axes, rows: list[dict[str, Any]]) -> None:
    _draw_line(axes, _points(rows, "loss"), "train", "tab:blue")
    steps, values = _points(rows, "eval_loss")
    if steps:
        axes.plot(steps, values, "o-", color="tab:red", markersize=5, linewidth=1.2, label="evaluation", zorder=3)
    axes.set_ylabel("loss (nats per token)" if any(row.get("tokens") for row in rows) else "loss")


def _points(rows: list[dict[str, Any]], key: str) -> Points:
    known = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _draw_line(axes: Axes, points: Points, label: str, color: str) -> None:
    steps, values = points
    if not steps:
        return
    if len(steps) < _SMOOTH_FROM:
        axes.plot(steps, values, color=color, linewidth=1.4, marker="." if len(steps) < 50 else None, label=label)
        return
    import numpy as np

    width = len(steps) // 50
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    middle = steps[width // 2 : width // 2 + len(smooth)]
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(middle, smooth, color=color, linewidth=1.6, label=f"{label} (mean of {width} steps)")
