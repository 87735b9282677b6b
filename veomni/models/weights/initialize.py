"""Layout-independent initialisation: each tensor depends only on (seed, name)."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veomni.compat.tensors import WrittenStorages, storage_key
from veomni.errors import ModelError
from veomni.models.build.constructor import constructor_values
from veomni.models.transformers_api.capabilities import is_pretrained
from veomni.models.transformers_api.construction import initialisers
from veomni.models.weights.slots import like, slots


@dataclass
class _Call:
    """One call that initialises a module, and the tensors that it writes."""

    name: str
    run: Callable[[], object]
    writes: set[str]


class Initializer:
    """Runs a model's own initialisation, a few tensors at a time, in a random stream of its own each, on a device.

    What every initialiser writes is found by running it once on a skeleton of the model, never sharded or wrapped.
    Tensors that are written by the same initialisers are made together, full size and in float32. What none writes has
    the value that the constructor of the model gives it.
    """

    def __init__(self, skeleton: nn.Module, device: torch.device, seed: int) -> None:
        self.device, self.seed, self._skeleton = device, seed, skeleton
        self._slots = {slot.name: slot for slot in slots(skeleton, remove_duplicate=False)}
        first: dict[int, str] = {}
        self._aliases = {name: first.setdefault(id(slot.tensor), name) for name, slot in self._slots.items()}
        storages = {storage_key(self._slots[name].tensor): name for name in first.values()}
        self._calls: list[_Call] = []
        for name, run in initialisers(skeleton):
            with WrittenStorages() as written, torch.no_grad():
                run()
            self._calls.append(_Call(name, run, {storages[key] for key in written.keys if key in storages}))

    def values(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Yield full tensors for ``names``, in groups to be dropped one by one; a ModelError if nothing sets one."""
        wanted = {self._aliases[name]: name for name in names}
        while wanted:
            group, calls = self._group(next(iter(wanted)))
            made = self._make(group, calls) if calls else self._constructed(wanted)
            yield {wanted.pop(name): value for name, value in made.items() if name in wanted}

    def _group(self, name: str) -> tuple[set[str], list[_Call]]:
        group, size = {name}, 0
        while len(group) > size:
            size = len(group)
            calls = [call for call in self._calls if call.writes & group]
            group = group.union(*(call.writes for call in calls))
        return group, calls

    def _constructed(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return values of those of ``names`` that no initialiser writes, as the constructor sets them."""
        written = set().union(*(call.writes for call in self._calls))
        left = [name for name in names if name not in written]
        made: dict[str, Tensor] = {}
        if is_pretrained(self._skeleton):
            with _seeded(self.seed, "", torch.device("cpu")):
                made = constructor_values(self._skeleton, left)
        lacking = next((name for name in left if name not in made), None)
        if lacking is not None:
            problem = f"nothing initialises {lacking}: its module has no _init_weights or reset_parameters that does"
            raise ModelError(problem, "write it there, or build the model with weights")
        return made

    def _make(self, group: set[str], calls: list[_Call]) -> dict[str, Tensor]:
        meta = {name: self._slots[name].tensor for name in group}
        made = {name: _zeros(tensor, self.device) for name, tensor in meta.items()}
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


def _zeros(tensor: Tensor, device: torch.device) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return like(tensor, torch.zeros(tensor.shape, dtype=dtype, device=device))


@contextmanager
def _seeded(seed: int, name: str, device: torch.device) -> Iterator[None]:
    number = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=accelerators, device_type="cuda" if device.type == "cpu" else device.type):
        torch.default_generator.manual_seed(number)
        if accelerators:
            backend = torch.get_device_module(device)
            with backend.device(device):
                backend.manual_seed(number)
        yield
