"""Which architectures a layout trains exactly: a tiny random model of each, against one process.

    python benchmarks/coverage.py --mode ulysses --write docs/coverage.md
    python benchmarks/coverage.py --mode experts --write docs/expert_coverage.md

Each takes one packed step in float64: alone and unpacked through plain transformers (the truth), alone and packed
through the launcher, and on two ranks: sharing every row (Ulysses), or the experts of every layer (expert parallelism).
An architecture is exact when every parameter's gradient equals the truth, refused when veomni says why it cannot be,
and wrong otherwise. Transformers' own limit is what plain transformers cannot run here either; not measured is what
fails before anything is packed or split, for a reason that nobody has looked into.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.harness import RankFailed, run_ranks
from tests.models.any_tiny import VOCAB, any_tiny_config, causal_types, expert_types, plain_inputs
from tests.parity.documents import Document, global_rows, share
from tests.parity.layouts import full_gradients
from tests.parity.oracle import Truth, truth_of
from veomni.errors import InputError, ModelError
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.models.loader import model_class
from veomni.strategies import DDP, FSDP2, Single, Ulysses

EXACT, REFUSED, LIMIT, UNMEASURED, WRONG = "exact", "refused", "transformers' own limit", "not measured", "wrong"
BOUND = 1e-9
_ASSISTANT = (
    "The set of layer types producing a cache is different than the set of layer types using them",
    "kv_sharing_modes of its configuration refuses to share all layers, which the model itself asks for",
)
LIMITS = {
    "gemma3n": ("requires the timm library", "its vision tower needs the timm package"),
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "git": ("Expected input batch_size", "its loss leaves out logits for an image before the text, also where there is none"),
}
"""What plain transformers raises where it does not run a model on tokens, with what it depends on itself; and why."""


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
        strategies: The layout of two ranks.
    """

    page: str
    title: str
    what: str
    types: Callable[[], list[str]]
    strategies: Callable[[], list[Any]]


MODES = {
    "ulysses": Mode(
        "docs/coverage.md",
        "Coverage of Ulysses",
        "Every causal language model of transformers, as a tiny random model: one packed step in float64 on two ranks\n"
        "that share every row, against one process that sees each document by itself. Written by",
        causal_types,
        lambda: [DDP(find_unused_parameters=True), Ulysses(2)],
    ),
    "experts": Mode(
        "docs/expert_coverage.md",
        "Coverage of expert parallelism",
        "Every mixture of experts that transformers trains on tokens, as a tiny random model: one packed step in float64\n"
        "on two ranks that share the experts of every layer, against one process that sees each document by itself.\n"
        "Written by",
        expert_types,
        lambda: [FSDP2(expert_parallel_size=2)],
    ),
}


def rows() -> list[list[Document]]:
    """Four packed rows of odd documents, one of them without labels."""
    return global_rows(VOCAB, 4)


def plain(model_type: str) -> None:
    """Run a model as transformers builds it, on one document that is its own label."""
    config = any_tiny_config(model_type)
    tokens = rows()[0][0].tokens[None]
    try:
        architecture: Any = model_class(config)
    except ModelError:  # nothing that learns tokens: the launcher says so
        return
    model = architecture._from_config(config)
    model(**plain_inputs(model_type, tokens), use_cache=False)


def truth(model_type: str) -> Truth:
    """The gradients to compare with."""
    return truth_of(any_tiny_config(model_type), rows())


def step(model_type: str, strategies: Callable[[], list[Any]]) -> dict[str, Any]:
    """One packed step through the launcher; what every rank runs."""
    launcher = Launcher(strategies(), accelerator="cpu", backend="gloo", precision="fp64", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(build_model(any_tiny_config(model_type), weights="random")).train()
    place = launcher.data_parallel
    for batch in launcher.track([share(rows(), place.rank, place.size, 1)]):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
    gradients = full_gradients(model)
    launcher.close()
    return gradients


def verdict(model_type: str, mode: str = "ulysses", *, alone: bool = False) -> Verdict:
    """Train one architecture all three ways; ``alone`` leaves the two ranks out."""
    try:
        run_ranks(plain, 1, model_type, init=False, timeout=120)
    except RankFailed as failed:
        raised, why = LIMITS.get(model_type, (None, ""))
        known = raised is not None and raised in str(failed)
        return Verdict(LIMIT, why) if known else Verdict(UNMEASURED, _reason(failed))
    packed = _gradients(model_type, lambda: [Single()], 1, "one process, packed")
    if isinstance(packed, Verdict):
        return packed
    try:
        (expected,) = run_ranks(truth, 1, model_type, init=False, timeout=120)
    except RankFailed as failed:
        return Verdict(UNMEASURED, _reason(failed))
    found = _compare(packed, expected, "one process, packed")
    if found.status != EXACT or alone:
        return found
    split = _gradients(model_type, MODES[mode].strategies, 2, "two ranks")
    return split if isinstance(split, Verdict) else _compare(split, expected, "two ranks")


def _gradients(
    model_type: str, strategies: Callable[[], list[Any]], ranks: int, where: str
) -> list[dict[str, Any]] | Verdict:
    try:
        return run_ranks(step, ranks, model_type, strategies, init=False, timeout=120)
    except RankFailed as failed:
        error = failed.exceptions.get(0)
        if isinstance(error, InputError):
            return Verdict(REFUSED, " ".join(error.problem.split()))
        return Verdict(WRONG, f"{where}: {_reason(failed)}")


def _compare(found: list[dict[str, Any]], expected: Truth, where: str) -> Verdict:
    if not expected.gradients:
        return Verdict(UNMEASURED, "no parameter has a gradient")
    worst = max(_error(gradients, expected) for gradients in found)
    return Verdict(EXACT, "", worst) if worst <= BOUND else Verdict(WRONG, where, worst)


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
    return _first_line(error) if error is not None else "the process died, or took too long"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def page(verdicts: dict[str, Verdict], mode: str) -> str:
    """The table as a page of the documentation."""
    import torch
    import transformers

    counts = Counter(found.status for found in verdicts.values())
    lines = [
        f"# {MODES[mode].title}",
        "",
        MODES[mode].what,
        "",
        "```console",
        f"python benchmarks/coverage.py --mode {mode} --write {MODES[mode].page}",
        "```",
        "",
        f"with torch {torch.__version__.split('+')[0]} and transformers {transformers.__version__}: "
        + ", ".join(f"{counts[status]} {status}" for status in (EXACT, REFUSED, LIMIT, UNMEASURED, WRONG))
        + ". The error is the largest of any parameter's gradient, relative to it.",
        "",
        "| architecture | status | error, or why not |",
        "|---|---|---|",
    ]
    for name, found in sorted(verdicts.items()):
        told = f"{found.error:.0e}" if found.status == EXACT else found.reason.replace("|", "/")[:110]
        lines.append(f"| {name} | {found.status} | {told} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="ulysses", help="the layout of the two ranks")
    parser.add_argument("--alone", action="store_true", help="one process only, packed against unpacked")
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("--jobs", type=int, default=2, help="architectures at the same time")
    args = parser.parse_args()
    verdicts: dict[str, Verdict] = {}
    types = args.only.split(",") if args.only else MODES[args.mode].types()
    # Forked workers, not threads: a fork in the middle of another thread's import would wait for it for ever.
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        judge = partial(verdict, mode=args.mode, alone=args.alone)
        for name, found in zip(types, pool.imap(judge, types), strict=True):
            verdicts[name] = found
            print(json.dumps({"type": name, **asdict(found)}), flush=True)
    print(Counter(found.status for found in verdicts.values()))
    if args.write:
        args.write.write_text(page(verdicts, args.mode))


if __name__ == "__main__":
    main()
