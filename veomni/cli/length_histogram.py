"""A picture of how long documents are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def plot_lengths(lengths: Sequence[int], capacity: int, out: Path, title: str) -> None:
    """Draw how many documents have how many tokens, and where a row ends.

    Args:
        lengths: Tokens of each document.
        capacity: Tokens of a row.
        out: The picture to write; its suffix says the format.
        title: Says what the lengths are of.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    values = np.asarray(lengths)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    last = max(int(values.max()), capacity)
    axes.hist(values, bins=np.linspace(0, last, 61).tolist(), color="tab:blue", edgecolor="white", linewidth=0.3)
    axes.axvline(capacity, color="tab:red", linestyle="--", label=f"data.max_seq_len {capacity}")
    for share, style in ((50, ":"), (95, "-.")):
        at = float(np.percentile(values, share))
        axes.axvline(at, color="black", linestyle=style, linewidth=1, label=f"{share} % have at most {at:.0f}")
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
