"""``veomni doctor``: what is installed and what is there, in a block for bug reports."""

import argparse
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import chain
from typing import Any

import torch.distributed as dist

from veomni.accelerators.base import ACCELERATORS
from veomni.version import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "pydantic", "pyarrow", "torchmetrics", "numpy")
_EXTRAS = {
    "gpu": ("flash-attn-4", "liger-kernel"),
    "npu": ("torch-npu",),
    "video": ("av",),
    "audio": ("soundfile",),
    "optional": ("flash-attn", "wandb", "tensorboard", "datasets"),
}
# Named one by one: an environment also holds keys and tokens.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR",
    "MASTER_PORT", "SLURM_JOB_ID", "SLURM_NTASKS", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME",
    "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "HF_HOME", "HF_HUB_OFFLINE",
    "VEOMNI_LOG_LEVEL",
)  # fmt: skip
_GIB = 1024**3


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print one line per fact."""
    variables = ((f"${name}", os.environ[name]) for name in _VARIABLES if name in os.environ)
    for name, fact in chain(_software(), _accelerators(), _machine(), variables):
        print(f"{name:<28}{fact}")


def _software() -> Iterator[tuple[str, str]]:
    yield "veomni", __version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    for package in _PACKAGES:
        yield package, _version(package)
    for extra, packages in _EXTRAS.items():
        yield f"extra {extra}", ", ".join(f"{package} {_version(package)}" for package in packages)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _accelerators() -> Iterator[tuple[str, str]]:
    for name in sorted(set(ACCELERATORS) - {"auto"}):
        try:
            family: Any = ACCELERATORS.get(name)
            fact = f"{family.device_count()} devices" if family.is_available() else "not available"
        except Exception as error:  # a broken driver or plug-in is a finding, and the other lines still matter
            fact = f"broken: {type(error).__name__}: {error}"
        yield f"accelerator {name}", fact
    known = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    found = [name for name, available in known.items() if dist.is_available() and available()]
    yield "collective backends", ", ".join(found) or "none"


def _machine() -> Iterator[tuple[str, str]]:
    yield "processors", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield "memory", f"{memory / _GIB:.1f} GiB"
    yield "open files", f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]} allowed"
    for path in (os.getcwd(), "/tmp", "/dev/shm"):  # noqa: S108
        if os.path.isdir(path):
            usage = shutil.disk_usage(path)
            yield f"disk {path}", f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
