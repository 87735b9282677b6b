"""Names of metrics: those that the library measures, and those that a loop adds."""

from __future__ import annotations

from collections.abc import Iterable

_MEASURED = frozenset(
    (
        "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "samples", "samples_per_second",
        "mfu_causal", "mfu_full", "peak_memory_gib", "perplexity", "aux_loss", "z_loss",
    )
)  # fmt: skip
_PREFIXES = ("loss_", "eval_loss", "source_", "expert_load_")


def extra_metrics(names: Iterable[str]) -> list[str]:
    """Return the names that a loop added, in order: ``accuracy`` and ``eval_accuracy``, not ``data_seconds``."""
    return [
        name
        for name in names
        if name not in _MEASURED and not name.startswith(_PREFIXES) and not name.endswith("_seconds")
    ]
