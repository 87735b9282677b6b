"""What is drawn of data: tokens in colour (green is supervised, grey is context), and how long documents are."""

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.text import Text

LEGEND = "green is supervised, grey is context"
_COUNTED_FROM = 4
_COLOURS = [f"tab:{name}" for name in ("blue", "orange", "green", "purple", "brown", "pink", "olive", "cyan")]
_BEYOND = 1.5  # rows long, and more is put into the last bar


def coloured(ids: Sequence[int], supervised: Sequence[bool], tokenizer: Any, counted: Collection[int] = ()) -> Text:
    """Return decoded tokens in colour; runs of the same id of ``counted`` are shown once, with their number."""
    text = Text()
    tokens = zip(ids, supervised, strict=True)
    runs = groupby(tokens, key=lambda token: (token[1], token[0] if token[0] in counted else None))
    for (is_supervised, media), group in runs:
        run = [index for index, _ in group]
        if media is not None and len(run) >= _COUNTED_FROM:
            text.append(f"{_safe(tokenizer.decode(run[:1]))} x {len(run)}", style="cyan")
        else:
            shown = _safe(tokenizer.decode(run, skip_special_tokens=False))
            text.append(shown, style="green" if is_supervised else "bright_black")
    return text


def _safe(text: str) -> str:
    # Data may hold escape sequences, which a terminal would obey.
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def plot_lengths(groups: Mapping[str, Sequence[int]], capacity: int, out: Path, title: str) -> None:
    """Draw how many documents have how many tokens, a colour for each group, and where a row of ``capacity`` ends."""
    values = np.concatenate([np.asarray(lengths) for lengths in groups.values()])
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    end = max(min(int(values.max()), round(_BEYOND * capacity)), capacity)
    edges = np.linspace(0, end, int(np.clip(2 * np.sqrt(len(values)), 12, 60)) + 1).tolist()
    axes.hist(
        [np.minimum(lengths, end) for lengths in groups.values()], bins=edges, stacked=True, edgecolor="white",
        linewidth=0.3, color=[_COLOURS[number % len(_COLOURS)] for number in range(len(groups))],
        label=[f"{name}: {len(lengths)}" for name, lengths in groups.items()],
    )  # fmt: skip
    axes.axvline(capacity, color="tab:red", linestyle="--", label=f"a row: data.max_seq_len {capacity}")
    for share, style in ((50, ":"), (95, "-.")):
        at = float(np.percentile(values, share))
        label = f"{share} % have at most {at:.0f}"
        shown = [at] if at <= end else []
        axes.vlines(shown, 0, 1, transform=axes.get_xaxis_transform(), colors="black", linestyles=style, label=label)
    if beyond := int((values > end).sum()):
        axes.plot([], [], " ", label=f"last bar: {beyond} longer than {end},\nthe longest {values.max()}")
    axes.set(
        xlim=(0, end * 1.01), xlabel="tokens of a document, media included",
        ylabel=f"documents per {edges[1]:.0f} tokens", axisbelow=True,
    )  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, alignment="left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
