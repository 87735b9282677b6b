"""The contract with torch: every private name that veomni declares is there, with the parameters it passes."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from veomni import compat
from veomni.compat import sharding
from veomni.compat.private_name import PRIVATE, PrivateName


def parameters_of(found: object) -> set[str]:
    if isinstance(found, torch._ops.OpOverloadPacket):
        return {argument.name for argument in found.default._schema.arguments}
    return set(inspect.signature(found).parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRIVATE, ids=lambda name: name.path.partition(":")[2])
def test_the_name_is_there_and_takes_what_is_passed(name: PrivateName) -> None:
    if name.device == "cuda" and not torch.backends.cuda.is_built():
        pytest.skip("this torch was built without CUDA")
    found = name.resolve()
    assert name.reason
    assert name.without
    if name.parameters:
        assert set(name.parameters) <= parameters_of(found)


def test_each_is_declared_once() -> None:
    paths = [name.path for name in PRIVATE]
    assert len(paths) == len(set(paths)) >= 20


def test_what_is_installed_is_undone() -> None:
    before = _fsdp_collectives.foreach_reduce_scatter_copy_in
    compat.install()
    compat.install()
    assert _fsdp_collectives.foreach_reduce_scatter_copy_in is sharding.copy_gradients
    compat.uninstall()
    restored = _fsdp_collectives.foreach_reduce_scatter_copy_in
    assert restored.__module__ == _fsdp_collectives.__name__
    assert before in (restored, sharding.copy_gradients)
