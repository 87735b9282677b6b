"""Storage and values for a model on the meta device, in the layout that a strategy gave it."""

from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from veomni.errors import ModelError
from veomni.logging import create_logger
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.transformers_api.conversions import copy_conversions
from veomni.models.weights.initialize import Initializer
from veomni.models.weights.safetensors_files import SafetensorsFiles
from veomni.models.weights.slots import Slot, copy_into, like, local_box, skeleton_of, slots, tied_names
from veomni.models.weights.stream import WeightStream
from veomni.parallel.wrappers import plain_name

logger = create_logger(__name__)


class Materializer:
    """Allocates and fills the meta parameters and buffers of a model that is not wrapped or sharded yet.

    Parameters are allocated on ``storage`` (None: ``device``); buffers, which a forward reads directly, on ``device``,
    where the model runs. Values come from the model's safetensors, each rank reading only the part it
    holds, or from a random stream that depends on the seed, the module's name and the kind of ``device``, so that
    parameters start equal whether they are offloaded or not. Dtypes are those of the meta tensors; random values are
    computed in float32 first, so that runs in float32 and float64 start from the same numbers. Tied parameters stay
    tied. With a ``group``, rank 0 reads each tensor once and broadcasts it. Weights that do not fit the model are a
    ModelError.
    """

    def __init__(
        self, model: nn.Module, *, device: torch.device, seed: int, group: ProcessGroup | None = None,
        storage: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.device, self.storage, self._group = device, storage or device, group
        skeleton = skeleton_of(model)
        self._initializer = Initializer(skeleton, device, seed) if _meta_slots(model, "") else None
        self._streams: dict[str, WeightStream] = {}
        for part, directory in ModelAdapter.of(model).weights.items():
            self._streams[part] = WeightStream(skeleton.get_submodule(part), SafetensorsFiles(directory))
            copy_conversions(skeleton.get_submodule(part), model.get_submodule(part))
        self._tied = {name: names[0] for name, names in tied_names(skeleton).items()}
        self._made: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def __call__(self, module: nn.Module, prefix: str = "") -> None:
        """Materialise everything under ``module``, called ``prefix``; a ModelError names what stays without values."""
        fresh: dict[str, Tensor] = {}
        for slot in _meta_slots(module, prefix):
            slot.put(self._storage(slot, fresh))
        for part, stream in self._streams.items():
            within = f"{part}." if part else ""
            named = {name: name.removeprefix(within) for name in fresh if name.startswith(within)}
            stream.fill({own: fresh.pop(name) for name, own in named.items() if stream.provides(own)}, self._group)
        self._initialize(fresh)
        _check_none_left(module, prefix)

    def _storage(self, slot: Slot, fresh: dict[str, Tensor]) -> Tensor:
        """Return the storage of a slot, the same for tied slots; new ones are entered into ``fresh``."""
        own = plain_name(slot.name)
        name = self._tied.get(own, own)
        tensor = self._made.get(name)
        if tensor is None:
            with torch.no_grad():  # of a DTensor: storage for this rank's shard
                device = self.storage if isinstance(slot.tensor, nn.Parameter) else self.device
                tensor = fresh[name] = like(slot.tensor, torch.empty_like(slot.tensor, device=device))
            if own in self._tied:
                self._made[name] = tensor
        return tensor

    def _initialize(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        assert self._initializer is not None
        if self._streams and (lacking := [name for name, t in tensors.items() if isinstance(t, nn.Parameter)]):
            logger.info_rank0("not in the checkpoint, and initialised: %s", ", ".join(lacking))
        for values in self._initializer.values(tensors):
            for name, value in values.items():
                copy_into(tensors[name], value[local_box(tensors[name])])


def _meta_slots(module: nn.Module, prefix: str) -> list[Slot]:
    return [slot for slot in slots(module, prefix) if slot.tensor.is_meta]


def _check_none_left(module: nn.Module, prefix: str) -> None:
    left = [plain_name(slot.name) for slot in _meta_slots(module, prefix)]
    for path, part in module.named_modules(prefix=prefix):
        tensors = (key for key, value in vars(part).items() if isinstance(value, Tensor) and value.is_meta)
        left += [plain_name(f"{path}.{key}") for key in tensors]
    if left:
        problem = f"no values for {', '.join(left[:10])}"
        raise ModelError(problem, "register them as buffers that _init_weights or reset_parameters fills")
