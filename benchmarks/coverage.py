"""Which architectures Ulysses trains exactly: a tiny random model of every causal language model in transformers.

    python benchmarks/coverage.py --write docs/coverage.md

Each takes one packed step in float64: alone and unpacked through plain transformers (the truth), alone and packed
through the launcher, and on two ranks that share every row. An architecture is exact when every parameter's gradient
equals the truth, refused when veomni says why it cannot be, and wrong otherwise. Not measured is what has no tiny
configuration here, or fails before anything is packed or split.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import AutoModelForCausalLM

from tests.harness import RankFailed, run_ranks
from tests.models.any_tiny import VOCAB, any_tiny_config, causal_types
from tests.parity.documents import Document, global_rows, share
from tests.parity.layouts import full_gradients
from tests.parity.oracle import Truth, truth_of
from veomni.errors import InputError
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import DDP, Single, Ulysses

EXACT, REFUSED, UNMEASURED, WRONG = "exact", "refused", "not measured", "wrong"
BOUND = 1e-9
COMMAND = "python benchmarks/coverage.py --write docs/coverage.md"


@dataclass(frozen=True)
class Verdict:
    """What was found about an architecture.

    Attributes:
        status: One of the four.
        reason: Why it is not exact.
        error: The largest relative error of a parameter's gradient; None where there was none to compare.
    """

    status: str
    reason: str = ""
    error: float | None = None


def rows() -> list[list[Document]]:
    """Four packed rows of odd documents, one of them without labels."""
    return global_rows(VOCAB, 4)


def truth(model_type: str) -> Truth:
    """The gradients to compare with, of a model whose own forward takes labels."""
    tokens = rows()[0][0].tokens[None]
    AutoModelForCausalLM.from_config(any_tiny_config(model_type))(input_ids=tokens, labels=tokens)
    return truth_of(any_tiny_config(model_type), rows())


def step(model_type: str, strategies: list[Any]) -> dict[str, Any]:
    """One packed step through the launcher; what every rank runs."""
    launcher = Launcher(strategies, accelerator="cpu", backend="gloo", precision="fp64", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(build_model(any_tiny_config(model_type), weights="random")).train()
    place = launcher.data_parallel
    for batch in launcher.track([share(rows(), place.rank, place.size, 1)]):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
    gradients = full_gradients(model)
    launcher.close()
    return gradients


def verdict(model_type: str) -> Verdict:
    """Train one architecture all three ways."""
    try:
        any_tiny_config(model_type)
    except Exception as error:  # whatever a configuration class raises
        return Verdict(UNMEASURED, f"no tiny configuration: {_first_line(error)}")
    try:
        (expected,) = run_ranks(truth, 1, model_type, init=False, timeout=120)
    except RankFailed as failed:
        return Verdict(UNMEASURED, _reason(failed))
    if not expected.gradients:
        return Verdict(UNMEASURED, "no parameter has a gradient")
    packed = _compare(expected, model_type, [Single()], "one process, packed")
    if packed.status != EXACT:
        return packed
    return _compare(expected, model_type, [DDP(find_unused_parameters=True), Ulysses(2)], "two ranks")


def _compare(expected: Truth, model_type: str, strategies: list[Any], where: str) -> Verdict:
    try:
        found = run_ranks(step, len(strategies), model_type, strategies, init=False, timeout=120)
    except RankFailed as failed:
        error = failed.exceptions.get(0)
        if isinstance(error, InputError):
            return Verdict(REFUSED, " ".join(error.problem.split()))
        return Verdict(WRONG, f"{where}: {_reason(failed)}")
    worst = max(_error(gradients, expected) for gradients in found)
    return Verdict(EXACT, "", worst) if worst <= BOUND else Verdict(WRONG, where, worst)


def _error(gradients: dict[str, Any], expected: Truth) -> float:
    scale = expected.grad_norm
    worst = 0.0
    for name, gradient in expected.gradients.items():
        found = gradients.get(name)
        difference = float(gradient.norm() if found is None else (found.double() - gradient).norm())
        # A gradient that is zero up to rounding (keys' biases) is measured by the whole norm.
        worst = max(worst, difference / max(float(gradient.norm()), 1e-6 * scale))
    return worst


def _reason(failed: RankFailed) -> str:
    error = failed.exceptions.get(0)
    return _first_line(error) if error is not None else "the process died, or took too long"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def page(verdicts: dict[str, Verdict]) -> str:
    """The table as a page of the documentation."""
    import torch
    import transformers

    counts = Counter(found.status for found in verdicts.values())
    lines = [
        "# Coverage of Ulysses",
        "",
        "Every causal language model of transformers, as a tiny random model: one packed step in float64 on two ranks",
        "that share every row, against one process that sees each document by itself. Written by",
        "",
        "```console",
        COMMAND,
        "```",
        "",
        f"with torch {torch.__version__.split('+')[0]} and transformers {transformers.__version__}: "
        + ", ".join(f"{counts[status]} {status}" for status in (EXACT, REFUSED, UNMEASURED, WRONG))
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
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("--jobs", type=int, default=2, help="architectures at the same time")
    args = parser.parse_args()
    verdicts: dict[str, Verdict] = {}
    types = args.only.split(",") if args.only else causal_types()
    # Forked workers, not threads: a fork in the middle of another thread's import would wait for it for ever.
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        for name, found in zip(types, pool.imap(verdict, types), strict=True):
            verdicts[name] = found
            print(json.dumps({"type": name, **asdict(found)}), flush=True)
    print(Counter(found.status for found in verdicts.values()))
    if args.write:
        args.write.write_text(page(verdicts))


if __name__ == "__main__":
    main()
