"""A picture of how evenly experts are used: each expert's load by layer, and how uneven it was over the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veomni.metrics.plot import step_lines

_MOST = 2.0  # times the mean load: where the colours end


def plot_expert_load(expert_load_jsonl: Path, out: Path) -> None:
    """Draw the load of every expert in the last step reported, and its violation over all of them.

    The violation of a layer is ``max load / mean load - 1`` (arXiv:2408.15664, section 4.1).

    Args:
        expert_load_jsonl: Lines of ``{"step": n, "tokens_per_expert": {router: [tokens of each expert]}}``.
        out: The picture to write; its suffix says the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = list(step_lines(expert_load_jsonl))
    if not lines:
        return
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    heat, curves = figure.subplots(2, 1, height_ratios=(3, 1))
    _draw_heat(figure, heat, lines[-1])
    _draw_violation(curves, lines)
    figure.savefig(out, dpi=120)


def relative_loads(line: dict[str, Any]) -> NDArray[np.float64]:
    """Return ``[routers, experts]``, loads divided by their layer's mean; NaN where a layer has fewer experts."""
    counts = list(line["tokens_per_expert"].values())
    table = np.full((len(counts), max(map(len, counts))), np.nan)
    for row, values in zip(table, counts, strict=True):
        row[: len(values)] = np.asarray(values) / max(np.mean(values), 1e-12)
    return table


def _draw_heat(figure: Any, axes: Any, line: dict[str, Any]) -> None:
    table = relative_loads(line)
    axes.set_facecolor("0.9")
    image = axes.imshow(table, aspect="auto", cmap="RdBu_r", vmin=0.0, vmax=_MOST, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, extend="max" if np.nanmax(table) > _MOST else "neither")
    bar.set_label("load / mean load of the layer")
    axes.set_title(f"load of the experts in step {line['step']}")
    axes.set_xlabel("expert")
    axes.set_ylabel("mixture-of-experts layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)


def _draw_violation(axes: Any, lines: list[dict[str, Any]]) -> None:
    steps = [line["step"] for line in lines]
    violations = [np.nanmax(relative_loads(line), axis=1) - 1 for line in lines]
    marker = "." if len(steps) < 50 else None
    axes.plot(steps, [layers.max() for layers in violations], color="tab:red", marker=marker, label="worst layer")
    axes.plot(steps, [layers.mean() for layers in violations], color="tab:blue", marker=marker, label="mean of layers")
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("step")
    axes.set_ylabel("max / mean load - 1")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
