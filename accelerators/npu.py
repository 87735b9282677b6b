"""Huawei Ascend NPUs through ``torch_npu``, which is imported only when they are chosen."""

import importlib
import importlib.util
from typing import Any

from typing_extensions import override

from veomni.accelerators.base import Accelerator
from veomni.errors import DeviceError, MissingExtraError


class NPU(Accelerator):
    """Ascend devices over HCCL."""

    name = "npu"
    device_type = "npu"
    backend = "hccl"
    experts_backends = ("npu", "loop")
    unavailable = (
        "no Ascend device is visible",
        "check the driver (npu-smi info) and ASCEND_RT_VISIBLE_DEVICES, or use accelerator cpu",
    )

    @override
    @classmethod
    def module(cls) -> Any:
        if importlib.util.find_spec("torch_npu") is None:
            raise MissingExtraError("torch_npu", "npu")
        try:  # torch_npu renames PyTorch's private-use device to "npu" when it is imported, so this comes first
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:
            raise DeviceError(
                f"torch_npu is installed but cannot be imported: {error}",
                "install CANN and source its set_env.sh, with a torch_npu of the same minor version as torch",
            ) from error
        return super().module()

    @override
    @classmethod
    def is_available(cls) -> bool:
        try:
            return super().is_available()
        except (DeviceError, MissingExtraError):
            return False
