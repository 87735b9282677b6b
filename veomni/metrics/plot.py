"""Plots of a run: losses, the loop's own metrics and the gradient norm; and how evenly experts are used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from veomni.metrics.progress import extra_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = list[dict[str, Any]]
_SMOOTH_FROM = 200
_EXTRA_COLORS = ("tab:purple", "tab:orange", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
_MOST_LOAD = 2.0  # times the mean: where the colours end


def plot_loss(metrics_jsonl: Path, out: Path) -> None:
    """Draw ``loss``, ``eval_loss``, ``grad_norm`` and the loop's own metrics over ``step``, where they are known."""
    lines = list(_read(metrics_jsonl))
    extra = extra_metrics(dict.fromkeys(name for line in lines for name in line if line[name] is not None))
    ratios = (2, 1, 1) if extra else (2, 1)
    figure, panels = _figure((9, 8 if extra else 6), ratios, sharex=True)
    _draw_curve(panels[0], lines, "loss", "train", "tab:blue")
    steps, values = _points(lines, "eval_loss")
    if steps:
        panels[0].plot(steps, values, "o-", color="tab:red", markersize=5, linewidth=1.2, label="evaluation", zorder=3)
    panels[0].set_ylabel("loss (nats per token)" if any(line.get("tokens") for line in lines) else "loss")
    for name, color in zip(extra, _EXTRA_COLORS, strict=False):
        _draw_curve(panels[1], lines, name, name, color)
    _draw_curve(panels[-1], lines, "grad_norm", "gradient norm", "tab:green")
    panels[-1].set(xlabel="step", ylabel="gradient norm")
    for axes in panels:
        _style(axes, legend=axes is not panels[-1])
    figure.savefig(out, dpi=120)


def plot_expert_load(expert_load_jsonl: Path, out: Path) -> None:
    """Draw the load of every expert in the last step reported, and its violation over all of them.

    The violation of a layer is ``max load / mean load - 1`` (arXiv:2408.15664, section 4.1). Lines are
    ``{"step": n, "tokens_per_expert": {router: [tokens of each expert]}}``.
    """
    lines = list(_read(expert_load_jsonl))
    if not lines:
        return
    figure, (heat, curves) = _figure((9, 7), (3, 1))
    table = relative_loads(lines[-1])
    heat.set_facecolor("0.9")
    image = heat.imshow(table, aspect="auto", cmap="RdBu_r", vmin=0.0, vmax=_MOST_LOAD, interpolation="nearest")
    bar = figure.colorbar(image, ax=heat, extend="max" if np.nanmax(table) > _MOST_LOAD else "neither")
    bar.set_label("load / mean load of the layer")
    title = f"load of the experts in step {lines[-1]['step']}"
    heat.set(title=title, xlabel="expert", ylabel="mixture-of-experts layer")
    heat.locator_params(integer=True)

    violations = [np.nanmax(relative_loads(line), axis=1) - 1 for line in lines]
    points = [{"step": line["step"], "worst": layers.max(), "mean": layers.mean()}
              for line, layers in zip(lines, violations, strict=True)]  # fmt: skip
    _draw_curve(curves, points, "worst", "worst layer", "tab:red")
    _draw_curve(curves, points, "mean", "mean of layers", "tab:blue")
    curves.set_ylim(bottom=0.0)
    curves.set(xlabel="step", ylabel="max / mean load - 1")
    curves.locator_params("x", integer=True)
    _style(curves, legend=True)
    figure.savefig(out, dpi=120)


def relative_loads(line: dict[str, Any]) -> NDArray[np.float64]:
    """Return ``[routers, experts]``, loads divided by their layer's mean; NaN where a layer has fewer experts."""
    counts = list(line["tokens_per_expert"].values())
    table = np.full((len(counts), max(map(len, counts))), np.nan)
    for row, values in zip(table, counts, strict=True):
        row[: len(values)] = np.asarray(values) / max(np.mean(values), 1e-12)
    return table


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file, without what a killed process left of its last one."""
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.endswith("\n"))


def _figure(size: tuple[float, float], ratios: tuple[int, ...], **options: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # and not pyplot, which would choose a backend for the process
    return figure, list(figure.subplots(len(ratios), 1, height_ratios=ratios, **options))


def _points(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    known = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _draw_curve(axes: Axes, lines: Lines, key: str, label: str, color: str) -> None:
    steps, values = _points(lines, key)
    if not steps:
        return
    if len(steps) < _SMOOTH_FROM:
        axes.plot(steps, values, color=color, linewidth=1.4, marker="." if len(steps) < 50 else None, label=label)
        return
    width = len(steps) // 50
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    middle = steps[width // 2 : width // 2 + len(means)]
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(middle, means, color=color, linewidth=1.6, label=f"{label} (mean of {width} steps)")


def _style(axes: Axes, *, legend: bool) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
