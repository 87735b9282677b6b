"""Which architectures a layout trains exactly: a tiny random model of each, against one process.

    python benchmarks/coverage.py --mode ulysses --write docs/coverage.md
    python benchmarks/coverage.py --mode experts --write docs/expert_coverage.md

Each takes one packed step in float64: alone and unpacked through plain transformers (the truth), alone and packed
through the launcher, and on two ranks: sharing every row (Ulysses), or the experts of every layer (expert parallelism).
For expert parallelism, what rejects packed rows is tried on rows of one document each.

An architecture is exact when every parameter's gradient equals the truth, unsupported when its examination
(``veomni.models.traits``) or an attention rejects it, and wrong otherwise. Transformers' own limit is what plain
transformers does not run on tokens either; not measured is what fails on documents alone. Reasons are those of errors.
With ``--only``, the other rows of a page stay.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.models.any_tiny import any_tiny_config, causal_types, expert_types, plain_inputs
from veomni.errors import InputError, ModelError
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.models.loader import model_class
from veomni.models.traits import MissingTraitError
from veomni.models.traits.shrink import VOCAB
from veomni.strategies import DDP, FSDP2, ExpertParallel, Single, Ulysses
from veomni.testing.documents import Document, global_rows, share
from veomni.testing.oracle import Truth, truth_of
from veomni.testing.ranks import RankFailed, run_ranks
from veomni.testing.step import full_gradients

STATUSES = EXACT, UNSUPPORTED, LIMIT, UNMEASURED, WRONG = (
    "exact", "unsupported", "transformers' own limit", "not measured", "wrong",
)  # fmt: skip
BOUND = 1e-9
_ROW = re.compile(r"^\| ([\w.-]+) \| ([\w' ]+) \| (.*) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Verdict:
    """What was found about an architecture.

    Attributes:
        status: One of the five.
        reason: Why it is not exact.
        error: The largest relative error of a parameter's gradient; None where there was none to compare.
    """

    status: str
    reason: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Mode:
    """A layout whose coverage is measured.

    Attributes:
        page: Where the results are written.
        title: Of that page.
        what: What it says was measured.
        types: The architectures that are tried.
        config: A tiny configuration of one of them.
        strategies: The layout of two ranks.
        needs_packing: Whether what rejects packed rows is unsupported as a whole.
    """

    page: str
    title: str
    what: str
    types: Callable[[], list[str]]
    config: Callable[[str], Any]
    strategies: Callable[[], list[Any]]
    needs_packing: bool


MODES = {
    "ulysses": Mode(
        "docs/coverage.md",
        "Coverage of Ulysses",
        "Every causal language model of transformers, as a tiny random model: one packed step in float64 on two ranks\n"
        "that share every row, against one process that sees each document alone. Written by",
        causal_types,
        any_tiny_config,
        lambda: [DDP(find_unused_parameters=True), Ulysses(2)],
        needs_packing=True,
    ),
    "experts": Mode(
        "docs/expert_coverage.md",
        "Coverage of expert parallelism",
        "Every mixture of experts that transformers trains on tokens, as a tiny random model: one packed step in "
        "float64\non two ranks that share the experts of every layer, against one process that sees each document "
        "alone.\nWritten by",
        expert_types,
        partial(any_tiny_config, experts=True),
        lambda: [FSDP2(), ExpertParallel(2)],
        needs_packing=False,
    ),
}


def single() -> list[Any]:
    """The layout of one process."""
    return [Single()]


def rows(packed: bool) -> list[list[Document]]:
    """Four rows: packed with odd documents, one of them without labels; or one document each."""
    whole = global_rows(VOCAB, 16)
    return whole[:4] if packed else [row for row in whole if len(row) == 1] * 2


def batches(packed: bool, rank: int, size: int) -> list[dict[str, Any]]:
    """The micro-batch of a data rank."""
    (batch,) = share(rows(packed), rank, size, 1)
    return [batch if packed else {name: batch[name] for name in ("input_ids", "labels")}]


def plain(model_type: str, mode: str) -> None:
    """Run a model as transformers builds it, on one document that is its own label."""
    config = MODES[mode].config(model_type)
    try:
        architecture: Any = model_class(config)
    except ModelError:  # nothing that learns tokens: the launcher says so
        return
    tokens = rows(packed=True)[0][0].tokens[None]
    architecture(config)(**plain_inputs(model_type, tokens), use_cache=False)


def truth(model_type: str, mode: str, packed: bool) -> Truth:
    """The gradients to compare with, of every document alone."""
    return truth_of(MODES[mode].config(model_type), rows(packed))


def step(model_type: str, mode: str, packed: bool, strategies: Callable[[], list[Any]]) -> dict[str, Any]:
    """One step through the launcher; what every rank runs."""
    launcher = Launcher(strategies(), accelerator="cpu", backend="gloo", precision="fp64", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(build_model(MODES[mode].config(model_type), weights="random")).train()
    for batch in launcher.track([batches(packed, *launcher.data_parallel)]):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
    gradients = full_gradients(model)
    launcher.close()
    return gradients


def verdict(model_type: str, mode: str = "ulysses", *, alone: bool = False) -> Verdict:
    """Train one architecture all three ways; ``alone`` leaves the two ranks out."""
    try:
        run_ranks(plain, 1, model_type, mode, init=False, timeout=120)
    except RankFailed as failed:
        return Verdict(LIMIT, _reason(failed))
    found = _judge(model_type, mode, packed=True, alone=alone)
    if found.status != UNSUPPORTED or MODES[mode].needs_packing:
        return found
    unpacked = _judge(model_type, mode, packed=False, alone=alone)
    return replace(unpacked, reason="one document per row") if unpacked.status == EXACT else unpacked


def _judge(model_type: str, mode: str, *, packed: bool, alone: bool) -> Verdict:
    lone = _gradients(model_type, mode, packed, single, 1)
    if isinstance(lone, Verdict):
        return lone
    try:
        (expected,) = run_ranks(truth, 1, model_type, mode, packed, init=False, timeout=120)
    except RankFailed as failed:
        return Verdict(UNMEASURED, _reason(failed))
    found = _compare(lone, expected)
    if found.status != EXACT or alone:
        return found
    shared = _gradients(model_type, mode, packed, MODES[mode].strategies, 2)
    return shared if isinstance(shared, Verdict) else _compare(shared, expected)


def _gradients(
    model_type: str, mode: str, packed: bool, strategies: Callable[[], list[Any]], ranks: int
) -> list[dict[str, Any]] | Verdict:
    try:
        return run_ranks(step, ranks, model_type, mode, packed, strategies, init=False, timeout=120)
    except RankFailed as failed:
        error = failed.exceptions.get(0)
        if isinstance(error, InputError):
            reason = error.reason if isinstance(error, MissingTraitError) else error.problem
            return Verdict(UNSUPPORTED, " ".join(reason.split()))
        return Verdict(WRONG, f"{_where(ranks)}: {_reason(failed)}")


def _compare(found: list[dict[str, Any]], expected: Truth) -> Verdict:
    if not expected.gradients:
        return Verdict(UNMEASURED, "no parameter has a gradient")
    worst = max(_error(gradients, expected) for gradients in found)
    return Verdict(EXACT, "", worst) if worst <= BOUND else Verdict(WRONG, _where(len(found)), worst)


def _where(ranks: int) -> str:
    return "one process" if ranks == 1 else f"{ranks} ranks"


def _error(gradients: dict[str, Any], expected: Truth) -> float:
    scale = expected.grad_norm
    worst = 0.0
    for name in expected.gradients.keys() | gradients.keys():
        gradient, found = expected.gradients.get(name), gradients.get(name)
        norm = 0.0 if gradient is None else float(gradient.norm())
        parts = [part.double() for part in (found, gradient) if part is not None]
        difference = float((parts[0] - parts[1]).norm() if len(parts) == 2 else parts[0].norm())
        # A gradient that is zero up to rounding (keys' biases) is measured by the whole norm.
        worst = max(worst, difference / max(norm, 1e-6 * scale))
    return worst


def _reason(failed: RankFailed) -> str:
    error = failed.exceptions.get(0)
    known = "the process died, or took too long"
    return known if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"


def cell(found: Verdict) -> str:
    """The error and the reason of a verdict, as the page has them."""
    error = [] if found.error is None else [f"{found.error:.0e}"]
    reason = [found.reason.replace("|", "/")[:110].strip()] if found.reason else []
    return ", ".join(error + reason)


def page(rows: dict[str, tuple[str, str]], mode: Mode, name: str) -> str:
    """The table as a page of the documentation, from the status and the cell of every architecture."""
    counts = Counter(status for status, _ in rows.values())
    numbers = ", ".join(f"{counts[status]} {status}" for status in STATUSES)
    table = "\n".join(f"| {model_type} | {status} | {text} |" for model_type, (status, text) in sorted(rows.items()))
    return f"""# {mode.title}

{mode.what}

```console
python benchmarks/coverage.py --mode {name} --write {mode.page}
```

with torch {torch.__version__.split("+")[0]} and transformers {transformers.__version__}: {numbers}. \
The error is the largest of any parameter's gradient, relative to it.

| architecture | status | error, or why not |
|---|---|---|
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="ulysses", help="the layout of the two ranks")
    parser.add_argument("--alone", action="store_true", help="one process only, packed against unpacked")
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("--jobs", type=int, default=2, help="architectures at the same time")
    args = parser.parse_args()
    types = args.only.split(",") if args.only else MODES[args.mode].types()
    found: dict[str, tuple[str, str]] = {}
    # Forked workers, not threads: a fork in the middle of another thread's import would wait for it for ever.
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        judge = partial(verdict, mode=args.mode, alone=args.alone)
        for name, each in zip(types, pool.imap(judge, types), strict=True):
            found[name] = each.status, cell(each)
            print(json.dumps({"type": name, **asdict(each)}), flush=True)
    print(Counter(status for status, _ in found.values()))
    if args.write:
        before = {name: (status, text) for name, status, text in _ROW.findall(args.write.read_text())}
        rows = {name: row for name, row in before.items() if row[0] in STATUSES} if args.only else {}
        args.write.write_text(page(rows | found, MODES[args.mode], args.mode))
        for name in sorted(found.keys() & before.keys()):
            if found[name][0] != before[name][0]:
                print(f"{name}: was {before[name][0]}, is {found[name][0]} ({found[name][1]})")


if __name__ == "__main__":
    main()
