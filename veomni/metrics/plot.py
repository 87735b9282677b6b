"""A picture of a run: the loss in training and evaluation, and below it the gradient norm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = tuple[list[int], list[float]]
_SMOOTH_FROM = 200


def plot_loss(metrics_jsonl: Path, out: Path) -> None:
    """Draw ``loss``, ``eval_loss`` and ``grad_norm`` over ``step``.

    Args:
        metrics_jsonl: A line of JSON per step; values that are null or missing, and a torn last line, are left
            out.
        out: The picture to write; its suffix says the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(step_lines(metrics_jsonl))
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, norm = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _draw_line(loss, _points(rows, "loss"), "train", "tab:blue")
    steps, values = _points(rows, "eval_loss")
    if steps:
        loss.plot(steps, values, "o-", color="tab:red", markersize=5, linewidth=1.2, label="evaluation", zorder=3)
    loss.set_ylabel("loss (nats per token)")
    _draw_line(norm, _points(rows, "grad_norm"), "gradient norm", "tab:green")
    norm.set_ylabel("gradient norm")
    norm.set_xlabel("step")
    for axes in (loss, norm):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if loss.get_legend_handles_labels()[0]:
        loss.legend(frameon=False)
    figure.savefig(out, dpi=120)


def step_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file of JSON lines, without what a killed process left of its last one."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


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
