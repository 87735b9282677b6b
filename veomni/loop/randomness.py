"""Seeds and random states of one process: Python, NumPy, PyTorch's CPU generator and the device's."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from veomni.accelerators import Accelerator


def seed_process(seed: int, rank: int) -> None:
    """Seed every generator of this process; ranks differ, so that their dropout masks do.

    Weights and data order do not come from these generators: they are functions of the seed alone on any layout.
    """
    import numpy as np

    own = (seed * 1_000_003 + rank) % (1 << 32)
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def use_deterministic_algorithms() -> None:
    """Make PyTorch choose reproducible kernels and raise where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class RandomState:
    """This process's generators as something with a ``state_dict``, for a checkpoint.

    Args:
        accelerator: Whose device generator is part of it.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, Any]:
        """Return all generators' states; PyTorch's as uint8 tensors."""
        import numpy as np

        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        version, internal, gauss = random.getstate()
        state: dict[str, Any] = {
            "python": {"version": version, "internal": list(internal), "gauss": gauss},
            "numpy": {
                "name": str(name),
                "keys": torch.from_numpy(np.asarray(keys).astype("int64")),
                "position": int(position),
                "has_gauss": int(has_gauss),
                "cached": float(cached),
            },
            "torch": torch.get_rng_state(),
        }
        device = self._accelerator.get_rng_state()
        if device is not None:
            state["device"] = device
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        import numpy as np

        python, legacy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
        keys = legacy["keys"].numpy().astype("uint32")
        np.random.set_state((legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["cached"]))
        torch.set_rng_state(_as_bytes(state["torch"]))
        if "device" in state:
            self._accelerator.set_rng_state(_as_bytes(state["device"]))


@contextmanager
def same_draws_after(accelerator: Accelerator) -> Iterator[None]:
    """Put all generators back as they were when the body ends: what follows draws what the body drew."""
    state = RandomState(accelerator)
    before = state.state_dict()
    yield
    state.load_state_dict(before)


def _as_bytes(state: Tensor) -> Tensor:
    return state.to(torch.uint8).cpu()
