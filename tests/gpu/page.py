"""Write docs/gpu_runs.md from the report of a run: ``python -m tests.gpu.page output/gpu.xml`` (``make gpu`` does)."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from platform import python_version

from veomni.testing.oracle import BOUNDS

PAGE = Path(__file__).parents[2] / "docs/gpu_runs.md"
HEAD = """# Runs on GPUs

`make gpu` runs the tests that need GPUs on all GPUs of a host, over NCCL (`tests/gpu/`): every pair of strategies in
each precision against the float64 oracle, memory before each of a hundred steps, checkpoints between layouts, killed,
hung and stopped runs. CI has no GPU. This page is written by it; the last run:
"""


def page(report: Path) -> str:
    """Return the page of a report, which pytest wrote with ``--junitxml``; one in which no test ran is an error."""
    (suite,) = ET.parse(report).getroot()
    facts = {each.get("name"): each.get("value") for each in suite.findall("properties/property")}
    results = {f"{case.get('classname')}.{case.get('name')}": result(case) for case in suite.findall("testcase")}
    counts = Counter(results.values())
    if not any(name.startswith("tests.gpu.") and kind != "skipped" for name, kind in results.items()):
        sys.exit("no test ran on GPUs: docs/gpu_runs.md stays as it is")
    software = [f"{package} {version(package)}" for package in ("torch", "transformers")]
    totals = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    rows = [
        ("date", suite.get("timestamp", "")[:16].replace("T", " ")),
        ("devices", facts.get("devices", "unknown")),
        ("software", ", ".join([f"Python {python_version()}", *software, facts.get("backend", "unknown")])),
        ("commit", facts.get("commit", "unknown")),
        ("tests", f"{totals} in {float(suite.get('time', 0)):.0f} s"),
    ]
    parts = [HEAD, table(("what", "value"), rows), precisions(suite)]
    broken = [f"- `{name}`" for name, kind in sorted(results.items()) if kind == "failed"]
    return "\n".join([*parts, *["\nFailed:\n", *broken] * bool(broken)]) + "\n"


def result(case: ET.Element) -> str:
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    return next((kinds[child.tag] for child in case if child.tag in kinds), "passed")


def precisions(suite: ET.Element) -> str:
    """The steps that were compared in each precision, and the worst error of any gradient of any rank."""
    errors: dict[str, list[float]] = defaultdict(list)
    for case in suite.findall("testcase"):
        found = [(each.get("name"), each.get("value")) for each in case.findall("properties/property")]
        each = [float(value) for name, value in found if name == "error" and value]
        if each:
            errors[dict(found)["precision"] or ""].append(max(each))
    rows = [
        (name, len(found), f"{max(found):.1e}", f"{BOUNDS[name.partition('_')[0]]:.0e}")
        for name, found in errors.items()
    ]
    return "\n" + table(("precision", "steps compared", "worst relative error of a gradient", "bound"), rows)


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    text = page(Path(sys.argv[1]))
    print(text)
    if not re.search(r"^\| devices \| \d+ x CPU", text, re.MULTILINE):  # the tests were tried, and no GPU was
        PAGE.write_text(text)
