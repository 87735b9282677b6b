"""A picture of how long documents are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_COLOURS = [f"tab:{name}" for name in ("blue", "orange", "green", "purple", "brown", "pink", "olive", "cyan")]
_BEYOND = 1.5  # rows long, and more is put into the last bar


def plot_lengths(groups: Mapping[str, Sequence[int]], capacity: int, out: Path, title: str) -> None:
    """Draw how many documents have how many tokens, and where a row ends.

    Args:
        groups: Tokens of each document, by what it holds: stacked in as many colours.
        capacity: Tokens of a row.
        out: The picture to write; its suffix says the format.
        title: Says what the lengths are of.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([np.asarray(lengths) for lengths in groups.values()])
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    end = max(min(int(values.max()), round(_BEYOND * capacity)), capacity)
    beyond = int((values > end).sum())
    edges = np.linspace(0, end, int(np.clip(2 * np.sqrt(len(values)), 12, 60)) + 1).tolist()
    axes.hist(
        [np.minimum(lengths, end) for lengths in groups.values()], bins=edges, stacked=True, edgecolor="white",
        linewidth=0.3, color=[_COLOURS[number % len(_COLOURS)] for number in range(len(groups))],
        label=[f"{name}: {len(lengths)}" for name, lengths in groups.items()],
    )  # fmt: skip
    axes.axvline(capacity, color="tab:red", linestyle="--", label=f"a row: data.max_seq_len {capacity}")
    for share, style in ((50, ":"), (95, "-.")):
        at = float(np.percentile(values, share))
        shown = [at] if at <= end else []
        label = f"{share} % have at most {at:.0f}"
        axes.vlines(shown, 0, 1, transform=axes.get_xaxis_transform(), colors="black", linestyles=style, label=label)
    if beyond:
        axes.plot([], [], " ", label=f"last bar: {beyond} longer than {end},\nthe longest {values.max()}")
    axes.set_xlim(0, end * 1.01)
    axes.set_xlabel("tokens of a document, media included")
    axes.set_ylabel(f"documents per {edges[1]:.0f} tokens")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, alignment="left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
