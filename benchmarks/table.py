"""The tables and pictures of docs/performance.md, made from what benchmarks/scale.py measured.

    python benchmarks/table.py out.jsonl                                     # prints the table
    python benchmarks/table.py out.jsonl --page docs/performance.md          # and puts it into the page
    python benchmarks/table.py out.jsonl --page docs/performance.md --timelines out before --assets benchmarks/assets

Of several results of a row, library and number of GPUs the last counts. In the page, what stands between
``<!-- scale -->`` and ``<!-- /scale -->`` is replaced. Timelines of the same name in several folders are drawn into one
picture, in the order of the folders.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.draw import NAMES, draw_bars, draw_timeline, gap_table

MARKS = ("<!-- scale -->", "<!-- /scale -->")


def read(files):
    """The last result of each row, library and number of GPUs, in the order of their first."""
    last = {}
    for file in files:
        for line in map(json.loads, file.read_text().splitlines()):
            last[line["row"], line["stack"], line["gpus"]] = line
    return list(last.values())


def work_of(result):
    """What a row trains, in words."""
    layers = f", {result['layers']} layers" if result["layers"] else ""
    axes = {"experts over": result["experts"], "Ulysses": result["ulysses"], "ring": result["ring"]}
    shared = [f"{word} {size if size > 0 else result['gpus']}" for word, size in axes.items() if size]
    extras = [
        *(["chats" if result["chats"] else f"packed, median {result['packed']}"] if result["packed"] else []),
        *([f"{result['recompute']} recomputation"] if result["recompute"] != "none" else []),
        *([result["optimizer"]] if result["optimizer"] != "adamw" else []),
    ]
    return ", ".join([f"{result['model']}{layers}, {result['rows']} x {result['length']:,}", *shared, *extras])


def table_of(results):
    """Markdown: a line for each result, and how many times as fast this library is as each peer on the same row."""
    lines = [
        "| row | work per GPU and step | GPUs | library | tokens/s a GPU | of matmul | ours is | peak | slowest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ours = {(each["row"], each["gpus"]): each.get("tokens_per_second") for each in results if each["stack"] == "ours"}
    flops = {each["row"]: each["flops_per_token"] for each in results if each.get("flops_per_token")}
    for each in results:
        measured = cells(each, ours.get((each["row"], each["gpus"])), flops.get(each["row"]))
        lines.append(f"| {each['row']} | {work_of(each)} | {each['gpus']} | {NAMES[each['stack']]} | {measured} |")
    return lines


def cells(result, ours, flops):
    """Tokens/s; FLOP/s of the model's products, of what a large product reaches there; ratio; memory; spread."""
    if "failed" in result:
        reason = result["failed"].strip().splitlines()[-1]
        return f"not measured: {reason} | | | | "
    speed = result["tokens_per_second"]
    ratio = f"{ours / speed:.2f} times as fast" if ours and result["stack"] != "ours" else ""
    reached = f"{speed * flops / result['matmul_tflops'] / 1e12:.3f}" if flops and result.get("matmul_tflops") else ""
    return (
        f"{speed:,.0f} | {reached} | {ratio} | {result['peak_gib']:.1f} GiB | {result['worst_over_median']:.2f} times"
    )


def weak_scaling(results):
    """Markdown: tokens/s per GPU on more GPUs, of those on the fewest, for rows that were measured on both."""
    lines = []
    done = [each for each in results if "failed" not in each]
    for row, stack in dict.fromkeys((each["row"], each["stack"]) for each in done):
        speeds = {
            each["gpus"]: each["tokens_per_second"] for each in done if (each["row"], each["stack"]) == (row, stack)
        }
        fewest = min(speeds)
        lines += [
            f"| {row} | {NAMES[stack]} | {fewest} to {gpus} | {speeds[gpus] / speeds[fewest]:.3f} |"
            for gpus in sorted(speeds)[1:]
        ]
    return (
        ["", "| row | library | GPUs | tokens/s a GPU, of the fewest |", "|---|---|---|---|", *lines] if lines else []
    )


def environment_of(results):
    """One line on what ran where."""
    known = dict.fromkeys((each["device"], each["torch"]) for each in results if "device" in each)
    return "; ".join(f"{device}, torch {torch}" for device, torch in known) + "."


def put(page, lines):
    """Replace what stands between the marks of a page."""
    begin, end = map(re.escape, MARKS)
    text, count = re.subn(
        f"{begin}.*{end}", lambda _: "\n".join([MARKS[0], *lines, MARKS[1]]), page.read_text(), flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{page} has {count} places between {MARKS[0]} and {MARKS[1]}; it needs one")
    page.write_text(text)


def pictures(results, folders, assets, base):
    """Draw bars and timelines into ``assets``; return Markdown lines that show them."""
    assets.mkdir(parents=True, exist_ok=True)
    draw_bars([each for each in results if "failed" not in each], assets / "scale.svg")
    shown = [("Tokens/s per GPU", assets / "scale.svg", [])]
    for name in dict.fromkeys(file.name for folder in folders for file in sorted(folder.glob("*.json"))):
        files = [folder / name for folder in folders if (folder / name).exists()]
        picture = assets / f"timeline_{Path(name).stem}.png"
        draw_timeline(files, picture)
        shown.append(
            (f"A step of {Path(name).stem}", picture, [line for file in files for line in ["", *gap_table(file)]])
        )
    return [line for title, file, text in shown for line in ("", f"![{title}]({relative(file, base)})", *text)]


def relative(file, base):
    return Path(os.path.relpath(file, base)).as_posix()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files of scale.py --json")
    parser.add_argument("--page", type=Path, help="put the lines between its marks")
    parser.add_argument("--timelines", type=Path, nargs="*", default=[], help="folders of scale.py --timelines")
    parser.add_argument("--assets", type=Path, help="draw pictures into this folder")
    args = parser.parse_args()
    results = read(args.results)
    lines = ["", environment_of(results), "", *table_of(results), *weak_scaling(results)]
    if args.assets:
        lines += pictures(results, args.timelines, args.assets, args.page.parent if args.page else Path())
    print("\n".join(lines))
    if args.page:
        put(args.page, [*lines, ""])


if __name__ == "__main__":
    main()
