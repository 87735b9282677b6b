from __future__ import annotations

import sys
import textwrap

import pytest
import torch

from veomni.accelerators import CPU, CUDA, NPU, Accelerator, select_accelerator
from veomni.accelerators.base import peak_flops_by_name
from veomni.errors import ConfigError, DeviceError, MissingExtraError
from veomni.testing.ranks import RankFailed, run_ranks

STUB = """
import types
import torch

torch.utils.rename_privateuse1_backend("npu")
calls = []
state = torch.arange(16, dtype=torch.uint8)
module = types.ModuleType("torch.npu")
module.is_available = lambda: True
module.device_count = lambda: 2
module.current_device = lambda: 1
module.get_device_name = lambda: "Ascend910B1"
module.set_device = lambda device: calls.append(("set_device", str(device)))
module.synchronize = lambda: calls.append(("synchronize",))
module.max_memory_allocated = lambda: 1234
module.reset_peak_memory_stats = lambda: calls.append(("reset_peak_memory_stats",))
module.get_device_properties = lambda index: types.SimpleNamespace(total_memory=64 * 2**30 + index)
module.get_rng_state = lambda: state.clone()
module.set_rng_state = lambda new: state.copy_(new)
torch._register_device_module("npu", module)
"""


def with_stub(folder, body):
    """Run ``body`` in a forked process that finds a torch_npu in ``folder``."""
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(body)
    sys.path.insert(0, str(folder))
    try:
        return run_ranks(use_npu, 1, init=False)[0]
    finally:
        sys.path.remove(str(folder))


def use_npu():
    npu = select_accelerator("npu")
    import torch_npu

    npu.set_device(npu.device(3))
    npu.synchronize()
    npu.reset_peak_memory()
    before = npu.get_rng_state()
    npu.set_rng_state(before + 1)
    return {
        "type": type(npu).__name__,
        "auto": type(select_accelerator("auto")).__name__,
        "device": str(npu.device(1)),
        "backend": npu.backend,
        "count": npu.device_count(),
        "peak": npu.peak_memory(),
        "total": npu.total_memory(),
        "rng_moved": bool((npu.get_rng_state() == before + 1).all()),
        "bf16": npu.peak_flops(torch.bfloat16),
        "fp32": npu.peak_flops(torch.float32),
        "varlen": npu.supports_varlen_attention,
        "calls": torch_npu.calls,
    }


def test_every_method_of_npu_against_a_stub(tmp_path):
    found = with_stub(tmp_path, STUB)
    assert found == {
        "type": "NPU",
        "auto": "NPU",
        "device": "npu:1",
        "backend": "hccl",
        "count": 2,
        "peak": 1234,
        "total": 64 * 2**30 + 1,
        "rng_moved": True,
        "bf16": 400e12,
        "fp32": None,
        "varlen": False,
        "calls": [("set_device", "npu:1"), ("synchronize",), ("reset_peak_memory_stats",)],
    }


def test_npu_without_torch_npu_says_what_to_install():
    with pytest.raises(MissingExtraError, match=r"pip install 'veomni\[npu\]'") as caught:
        select_accelerator("npu")
    assert caught.value.exit_code == 78


def test_torch_npu_without_cann_is_a_device_error(tmp_path):
    broken = textwrap.dedent("""raise ImportError("libhccl.so: cannot open shared object file")""")
    with pytest.raises(RankFailed, match=r"libhccl.so.*\n.*install CANN"):
        with_stub(tmp_path, broken)


def test_npu_without_a_device_is_a_device_error(tmp_path):
    with pytest.raises(RankFailed, match="no Ascend device is visible"):
        with_stub(tmp_path, STUB.replace("is_available = lambda: True", "is_available = lambda: False"))


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs a PyTorch without CUDA, as on CI")
def test_cuda_without_a_cuda_build_says_so():
    with pytest.raises(DeviceError, match="built without CUDA"):
        select_accelerator("cuda")


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'cuda'"):
        select_accelerator("cudda")


def test_an_object_is_taken_as_it_is():
    cpu = CPU()
    assert select_accelerator(cpu) is cpu


def test_cpu_facts():
    cpu = CPU()
    before = cpu.peak_memory()
    block = torch.ones(64 * 2**20)
    assert cpu.peak_memory() >= before + block.nbytes // 2
    assert cpu.total_memory() > cpu.peak_memory()
    assert cpu.get_rng_state() is None
    assert cpu.peak_flops(torch.bfloat16) is None


def test_more_processes_than_devices_is_rejected_unless_shared():
    class OneGPU(CUDA):
        @classmethod
        def device_count(cls):
            return 1

    with pytest.raises(DeviceError, match="2 processes were requested but there are 1 cuda devices"):
        OneGPU().check_devices(2, shared=False)
    OneGPU().check_devices(2, shared=True)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA GB200", 2500),
        ("RTX 9999", None),
    ],
)
def test_peak_flops_are_known_or_none(name, tera):
    assert peak_flops_by_name(name, torch.bfloat16) == (None if tera is None else tera * 1e12)
    assert peak_flops_by_name(name, torch.float64) is None


def test_a_family_names_itself_its_devices_and_its_collectives():
    for family in (CPU, CUDA, NPU):
        assert issubclass(family, Accelerator)
        assert family.name == family.device_type
        assert family.backend
