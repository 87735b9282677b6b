"""Which number formats a run uses, chosen by one name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from veomni.errors import ConfigError
from veomni.registry import did_you_mean


@dataclass(frozen=True)
class Precision:
    """Number formats of a run.

    Attributes:
        name: What a configuration calls it.
        storage: Master weights, gradients as the optimizer sees them, optimizer state.
        compute: Matrix products and activations.
        reduce: Gradient reduction between ranks.
    """

    name: str
    storage: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype

    @property
    def mixed(self) -> bool:
        """Whether compute differs from storage."""
        return self.compute is not self.storage


PRECISIONS = {
    "fp64": Precision("fp64", torch.float64, torch.float64, torch.float64),
    "fp32": Precision("fp32", torch.float32, torch.float32, torch.float32),
    "bf16": Precision("bf16", torch.float32, torch.bfloat16, torch.float32),
}


def select_precision(name: str, *, reduce: str = "fp32") -> Precision:
    """Return the precision called ``name``.

    Args:
        name: "fp64", "fp32" or "bf16".
        reduce: What bf16 runs sum gradients in: "fp32", or "bf16" to halve the traffic; other runs ignore it.

    Raises:
        ConfigError: there is no such precision.
    """
    if name in ("fp16", "float16", "half"):
        raise ConfigError(
            f"{name} is not supported", "use bf16, which needs no loss scaling", field="Launcher.precision"
        )
    if name not in PRECISIONS:
        raise ConfigError(f"no precision is called {name!r}", did_you_mean(name, list(PRECISIONS)))
    chosen = PRECISIONS[name]
    return replace(chosen, reduce=torch.bfloat16) if chosen.mixed and reduce == "bf16" else chosen
