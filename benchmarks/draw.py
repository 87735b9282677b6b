"""Figures of the results of benchmarks/scale.py: bars of tokens/s beside peers, and the timeline of a step."""

from __future__ import annotations

import json

from benchmarks.timeline import LONG

LANES = {"compute": "#2f6f9f", "communication": "#c0672b", "copies": "#6b8e4e"}
NAMES = {"ours": "VeOmni", "torchtitan": "torchtitan", "upstream": "VeOmni upstream", "accelerate": "Accelerate",
         "fabric": "Lightning Fabric"}  # fmt: skip
COLORS = {
    "ours": "#2f6f9f",
    "torchtitan": "#c0672b",
    "upstream": "#6b8e4e",
    "accelerate": "#8a6d9c",
    "fabric": "#888888",
}
NAMED = 4
"""Gaps of a timeline that are numbered, the longest ones."""


def figure(width, height):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "veomni"  # the same numbers give the same file
    return pyplot.subplots(figsize=(width, height), layout="constrained")


def save(drawing, file):
    from matplotlib import pyplot

    drawing.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(drawing)


def draw_bars(results, file):
    """Tokens/s per GPU of every row on the most GPUs it ran on, one bar a library."""
    most = {each["row"]: max(other["gpus"] for other in results if other["row"] == each["row"]) for each in results}
    results, rows = [each for each in results if each["gpus"] == most[each["row"]]], list(most)
    stacks = [name for name in NAMES if any(each["stack"] == name for each in results)]
    drawing, axes = figure(max(6.0, 1.6 * len(rows)), 3.6)
    width = 0.8 / len(stacks)
    for place, stack in enumerate(stacks):
        found = {each["row"]: each["tokens_per_second"] / 1e3 for each in results if each["stack"] == stack}
        at = [rows.index(row) + (place - (len(stacks) - 1) / 2) * width for row in found]
        bars = axes.bar(at, list(found.values()), width * 0.92, color=COLORS[stack], label=NAMES[stack])
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(rows)), [f"{row}\n{most[row]} GPUs" for row in rows])
    axes.set_ylabel("thousand tokens/s per GPU")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(drawing, file)


def draw_timeline(files, file):
    """One step each of several profiles, such as before and after a change, on one scale; long gaps are numbered."""
    steps = {title_of(path): json.loads(path.read_text()) for path in files}
    drawing, axes = figure(12, 0.6 + 1.7 * len(steps))
    ticks = []
    for number, (title, step) in enumerate(steps.items()):
        top = -4.0 * number
        for place, (lane, color) in enumerate(LANES.items()):
            spans = [(begin / 1e3, long / 1e3) for kind, begin, long, _ in step["spans"] if kind == lane]
            axes.broken_barh(spans, (top - place - 0.4, 0.8), color=color, linewidth=0)
            ticks.append((top - place, f"{title}: {lane}" if place == 0 else lane))
        name_gaps(axes, step, top)
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.set_xlabel("ms")
    axes.set_xlim(0, max(step["microseconds"] for step in steps.values()) / 1e3)
    axes.spines[["top", "right"]].set_visible(False)
    save(drawing, file)


def name_gaps(axes, step, top):
    """Mark the gaps of a step; the longest are numbered, as the table of gaps is."""
    for number, gap in enumerate(longest_gaps(step), 1):
        begin = gap["at"] / 1e3
        axes.broken_barh([(begin, gap["ms"])], (top - 2.45, 2.9), color="#d04040", alpha=0.25, linewidth=0)
        axes.annotate(str(number), (begin + gap["ms"] / 2, top + 0.5), ha="center", fontsize=7, color="#a02020")


def title_of(path):
    return f"{path.parent.name}/{path.stem}"


def longest_gaps(step):
    """The gaps of a step that are named, longest first."""
    return sorted(step["gaps"], key=lambda gap: -gap["ms"])[:NAMED]


def gap_table(path):
    """Markdown lines of a profile's gaps: how long, and which operation of the host launched what followed."""
    step = json.loads(path.read_text())
    total = sum(gap["ms"] for gap in step["gaps"])
    lines = [
        f"{title_of(path)}: a step of {step['microseconds'] / 1e3:.0f} ms, "
        f"{len(step['gaps'])} gaps over {LONG:.0f} us that take {total:.1f} ms.",
        "",
        "| | ms | the host's operation that launched what followed | what followed |",
        "|---|---|---|---|",
    ]
    for number, gap in enumerate(longest_gaps(step), 1):
        named = " > ".join([*gap["under"], *(f"waits in {name}" for name in gap["host_waits"])])
        lines.append(
            f"| {number} | {gap['ms']:.2f} | {named or 'queued in time: another stream or rank'} | `{gap['after']}` |"
        )
    return lines
