"""Seeds and random states of one process: Python, NumPy, PyTorch's CPU generator and the device's."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from veomni.accelerators import Accelerator


def seed_process(seed: int, rank: int) -> None:
    """Seed every generator of this process; ranks differ, so that their dropout masks do.

    Weights and data order do not come from these generators: they are functions of the seed alone on any layout.
    """
    own = (seed * 1_000_003 + rank) % (1 << 32)
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def use_deterministic_algorithms() -> None:
    """Make PyTorch choose reproducible kernels and raise where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@dataclass
class RandomState:
    """This process's generators, the accelerator's among them, with a ``state_dict`` of tensors and plain values."""

    accelerator: Accelerator

    def state_dict(self) -> dict[str, Any]:
        """Return all generators' states; PyTorch's as uint8 tensors."""
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        version, internal, gauss = random.getstate()
        device = self.accelerator.get_rng_state()
        return {
            "python": [version, list(internal), gauss],
            "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype("int64")), int(position), int(has_gauss),
                      float(cached)],
            "torch": torch.get_rng_state(),
            **({} if device is None else {"device": device}),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype("uint32"), *rest))
        torch.set_rng_state(state["torch"].to("cpu", torch.uint8))
        if "device" in state:
            self.accelerator.set_rng_state(state["device"].to("cpu", torch.uint8))


@contextmanager
def same_draws_after(accelerator: Accelerator) -> Iterator[None]:
    """Restore all generators when the body ends: what follows draws what the body drew."""
    state = RandomState(accelerator)
    before = state.state_dict()
    yield
    state.load_state_dict(before)
