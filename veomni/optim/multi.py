"""Several optimizers, or several schedules, behind one: PyTorch's kernels cannot mix parameters of two meshes."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from veomni.errors import CheckpointError, ModelError


class MultiOptimizer(Optimizer):
    """Step several optimizers, by name, as one; no parameter may belong to two (ModelError), and there must be one.

    It is an optimizer in every respect: ``param_groups`` are the members' own, one member after the other, and
    ``state_dict`` has the form and the order that one optimizer over all these groups would give it. So schedules, step
    hooks and ``torch.distributed.checkpoint`` take it as they take any other.
    """

    def __init__(self, members: Mapping[str, Optimizer]) -> None:
        self.members = dict(members)
        held = Counter(parameter for group in self.param_groups for parameter in group["params"])
        if not held or max(held.values()) > 1:
            names = ", ".join(self.members)
            raise ModelError(f"the optimizers {names} share parameters, or have none", "give each its own")
        super().__init__(self.param_groups, {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The members' groups, one member after the other: the very dictionaries that they read."""
        return [group for member in self.members.values() for group in member.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        pass  # PyTorch's constructor starts with none; they are the members'

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state that members keep of each parameter; a parameter of none has an empty state, as in PyTorch."""
        kept: defaultdict[Tensor, Any] = defaultdict(dict)
        for member in self.members.values():
            kept.update(member.state)
        return kept

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        pass

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Reject a group that is no member's with a ModelError: nothing would step it."""
        if not any(param_group is group for group in self.param_groups):
            raise ModelError("a MultiOptimizer has no groups of its own", "add the group to one of its members")

    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every member; ``closure``, which computes the loss and the gradients, is called once."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for member in self.members.values():
            member.step()
        return loss

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members.values():
            member.zero_grad(set_to_none=set_to_none)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give every member its part of what ``state_dict`` returned; a CheckpointError where groups differ."""
        groups = list(state_dict["param_groups"])
        saved, sizes = ([len(group["params"]) for group in each] for each in (groups, self.param_groups))
        if saved != sizes:
            raise CheckpointError(
                f"the optimizer's state has groups of {saved} parameters, this run has {sizes}",
                "load it by name, as checkpoints do, or build the optimizer as in the run that saved it",
            )
        for member in self.members.values():
            own = [groups.pop(0) for _ in member.param_groups]
            keys = {key for group in own for key in group["params"]}
            kept = {key: value for key, value in state_dict["state"].items() if key in keys}
            member.load_state_dict({"state": kept, "param_groups": own})


class MultiLRScheduler:
    """Step several schedules, by name, as one, so that every member of a :class:`MultiOptimizer` can have its own.

    One schedule over the :class:`MultiOptimizer` itself is enough where only the peak rates differ: groups have those.
    """

    def __init__(self, schedulers: Mapping[str, LRScheduler]) -> None:
        self.schedulers = dict(schedulers)

    def step(self) -> None:
        """Move on to the next step's rates; to be called after ``optimizer.step()``."""
        for scheduler in self.schedulers.values():
            scheduler.step()

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the rates of all groups, one schedule after the other."""
        return [rate for scheduler in self.schedulers.values() for rate in scheduler.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every schedule by its name."""
        return {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned; a CheckpointError where the schedules have other names."""
        if state_dict.keys() != self.schedulers.keys():
            problem = f"the state is of schedules {', '.join(state_dict)}, this run has {', '.join(self.schedulers)}"
            raise CheckpointError(problem, "give them the names of the run that saved it")
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(state_dict[name])


def members_by_mesh(
    groups: Iterable[Mapping[str, Any]], factory: Callable[[list[dict[str, Any]]], Optimizer]
) -> dict[str, Optimizer]:
    """Return what ``factory`` makes of the groups on each device mesh, by the names of its axes.

    A group is split where its parameters live on several meshes. Optimizers are called "unsharded", "fsdp",
    "ep_fsdp.ep" and the like, in the order of the parameters.
    """
    by_mesh: dict[DeviceMesh | None, list[dict[str, Any]]] = defaultdict(list)
    for group in groups:
        parts: dict[DeviceMesh | None, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            parts[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
        for mesh, parameters in parts.items():
            by_mesh[mesh].append({**group, "params": parameters})
    members: dict[str, Optimizer] = {}
    for mesh, part in by_mesh.items():
        name = "unsharded" if mesh is None else ".".join(mesh.mesh_dim_names or ("sharded",))
        members[name if name not in members else f"{name}.{len(members)}"] = factory(part)
    return members


def combine(members: Mapping[str, Optimizer]) -> Optimizer:
    """Return a :class:`MultiOptimizer`, or the optimizer itself where there is only one."""
    return next(iter(members.values())) if len(members) == 1 else MultiOptimizer(members)
