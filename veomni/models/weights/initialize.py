"""Random weights that are the same for any layout: a function of the seed and the module's name alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veomni.compat.dispatch_mode import TorchDispatchMode
from veomni.errors import ModelError
from veomni.models.build.constructor import constructor_values
from veomni.models.transformers_api.capabilities import is_pretrained
from veomni.models.transformers_api.construction import init_weights, initialisers


@dataclass
class _Initialiser:
    """One call that initialises: of which module, and which tensors it writes."""

    name: str
    module: nn.Module
    owner: nn.Module | None
    writes: set[str] = field(default_factory=set)

    def run(self) -> None:
        if self.owner is not None:
            init_weights(self.owner, self.module)
        else:
            _reset(self.module)


class Initializer:
    """Runs a model's own initialisation, a few tensors at a time, in a random stream of its own each.

    What every initialiser writes is found by running it once on the meta device. Tensors that are written by the same
    initialisers are made together, full size and in float32. What none writes has the value that the constructor of
    the model gives it.

    Args:
        skeleton: A copy of the model on the meta device, never sharded or wrapped.
        device: Where values are computed.
        seed: The seed of the run.
    """

    def __init__(self, skeleton: nn.Module, device: torch.device, seed: int) -> None:
        self.device, self.seed, self._skeleton = device, seed, skeleton
        self._slots = dict(_slots(skeleton))
        self._aliases = _canonical_names(self._slots)
        self._initialisers = [_Initialiser(*entry) for entry in initialisers(skeleton)]
        self._trace()

    def values(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Yield full tensors for ``names``, in groups that are to be dropped before the next is made.

        Raises:
            ModelError: nothing initialises one of them.
        """
        wanted = {self._aliases[name]: name for name in names}
        while wanted:
            group, calls = self._group(next(iter(wanted)))
            made = self._make(group, calls) if calls else self._constructed(wanted)
            yield {wanted.pop(name): value for name, value in made.items() if name in wanted}

    def _trace(self) -> None:
        storages = {_storage(self._slots[name]): name for name in set(self._aliases.values())}
        for initialiser in self._initialisers:
            with _Writes() as writes, torch.no_grad():
                initialiser.run()
            initialiser.writes = {storages[storage] for storage in writes.storages if storage in storages}

    def _group(self, name: str) -> tuple[set[str], list[_Initialiser]]:
        group, size = {name}, 0
        while len(group) > size:
            size = len(group)
            calls = [initialiser for initialiser in self._initialisers if initialiser.writes & group]
            group = group.union(*(initialiser.writes for initialiser in calls))
        return group, calls

    def _constructed(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return values of those of ``names`` that no initialiser writes, as the constructor sets them."""
        written = set().union(*(initialiser.writes for initialiser in self._initialisers))
        left = [name for name in names if name not in written]
        made: dict[str, Tensor] = {}
        if is_pretrained(self._skeleton):
            with _seeded(self.seed, "", torch.device("cpu")):
                made = constructor_values(self._skeleton, left)
        lacking = [name for name in left if name not in made]
        if lacking:
            raise ModelError(
                f"nothing initialises {lacking[0]}: its module has no _init_weights or reset_parameters that writes it",
                "write it there, or build the model with weights",
            )
        return made

    def _make(self, group: set[str], calls: list[_Initialiser]) -> dict[str, Tensor]:
        meta = {name: self._slots[name].tensor for name in group}
        made = {name: _temporary(tensor, self.device) for name, tensor in meta.items()}
        self._put(made)
        try:
            for call in calls:
                with _seeded(self.seed, call.name, self.device), torch.no_grad():
                    call.run()
        finally:
            self._put(meta)
        return {name: tensor.detach() for name, tensor in made.items()}

    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, canonical in self._aliases.items():
            if canonical in tensors:
                self._slots[name].put(tensors[canonical])


@dataclass
class _Slot:
    table: dict[str, Any]
    key: str

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = self.table[self.key]
        return tensor

    def put(self, tensor: Tensor) -> None:
        self.table[self.key] = tensor


def _slots(model: nn.Module) -> Iterator[tuple[str, _Slot]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    yield f"{prefix}.{key}" if prefix else key, _Slot(table, key)


def _canonical_names(slots: dict[str, _Slot]) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(slot.tensor), name) for name, slot in slots.items()}


def _storage(slot: _Slot) -> int:
    return slot.tensor.untyped_storage()._cdata


class _Writes(TorchDispatchMode):
    """Records the storages that in-place operations write to."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            self.storages.add(args[0].untyped_storage()._cdata)
        return func(*args, **(kwargs or {}))


def _reset(module: nn.Module) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        method = getattr(module, name, None)
        if callable(method):
            method()
            return


def _temporary(tensor: Tensor, device: torch.device) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    zeros = torch.zeros(tensor.shape, dtype=dtype, device=device)
    return nn.Parameter(zeros, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros


@contextmanager
def _seeded(seed: int, name: str, device: torch.device) -> Iterator[None]:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=accelerators, device_type="cuda" if device.type == "cpu" else device.type):
        number = int.from_bytes(digest[:8], "little") >> 1
        torch.default_generator.manual_seed(number)
        if accelerators:
            backend = torch.get_device_module(device)
            with backend.device(device):
                backend.manual_seed(number)
        yield
