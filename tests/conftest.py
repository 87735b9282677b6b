"""One thread a process: forked ranks must not inherit a running OpenMP pool, and two cores are shared by all ranks."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

from tests.together import Together, selected

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def outcomes(request):
    """What each rank of a case came to: ``outcomes(case)``, for cases that are a test's parameter ``case``."""
    return Together(selected(request.session.items, request.module))
