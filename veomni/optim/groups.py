"""Groups of parameters by name: which are decayed, and which have a learning rate of their own."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

from torch import nn
from torch.optim import Optimizer

from veomni.errors import ConfigError, ModelError
from veomni.parallel.wrappers import FSDP1_PREFIX, fsdp1_parameters, plain_name
from veomni.registry import did_you_mean

Groups = list[dict[str, Any]]
NO_DECAY = ("*norm*", "*.bias")
"""What is not decayed by default: parameters that never are, so these patterns may match nothing."""

_LR_SCALE = "lr_scale"


class NamedParameters(dict[nn.Parameter, list[str]]):
    """All names that the user's module gives each parameter, under any wrapper; a tied one has several."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        inside = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        for name, parameter in inside.named_parameters(remove_duplicate=False):
            self.setdefault(parameter, []).append(plain_name(name))

    def matching(self, patterns: Sequence[str], argument: str, may_miss: Sequence[str] = ()) -> set[nn.Parameter]:
        """Return the parameters that shell patterns match, by a name or by the module that they are in.

        A pattern of ``argument`` that is not in ``may_miss`` and matches nothing is a ConfigError.
        """
        found: set[nn.Parameter] = set()
        for pattern in patterns:
            hits = {parameter for parameter, names in self.items() if any(_matches(name, pattern) for name in names)}
            if not hits and pattern not in may_miss:
                fix = did_you_mean(pattern, list(chain.from_iterable(self.values())))
                raise ConfigError(f"{argument}: no parameter matches {pattern!r}", fix)
            found |= hits
        return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def is_fsdp1(model: nn.Module) -> bool:
    """Whether FSDP1 wraps the model, or a part of it."""
    return any(FSDP1_PREFIX[:-1] in name for name, _ in model.named_modules())


def build_optimizer_groups(model: nn.Module, *, weight_decay: float, no_decay: Sequence[str]) -> Groups:
    """Split the trained parameters (a ModelError without any) into a group with weight decay and one without.

    Parameters of fewer than two dimensions (norms, sinks) and biases are never decayed; matrices are, embeddings
    included, unless a shell pattern of ``no_decay`` matches their name or that of a module around them:
    ``*.embed_tokens`` or ``model.layers.0.*``; one that matches nothing is a ConfigError. A tied parameter comes once,
    and is named by any of its names. The split is the same in every layout, before and after a strategy took the model
    over. Under FSDP1 this is collective.
    """
    parameters = NamedParameters(model)
    exempt = parameters.matching(no_decay, "no_decay", may_miss=NO_DECAY)
    # FSDP1's shards are flat.
    dimensions = {name: whole.ndim for name, whole in fsdp1_parameters(model)} if is_fsdp1(model) else {}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter, (name, *_) in parameters.items():
        if parameter.requires_grad:
            vector = dimensions.get(name, parameter.ndim) < 2 or name.endswith("bias")
            (kept if vector or parameter in exempt else decayed).append(parameter)
    if not decayed and not kept:
        raise ModelError("every parameter of the model is frozen", "leave something to train")
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def split_by_lr_scale(model: nn.Module, groups: Groups, lr_scale: Mapping[str, float]) -> Groups:
    """Split groups so that each has parameters of one factor, and note it in them; :func:`scale_lr` applies it.

    ``lr_scale`` maps shell patterns of parameter or module names to positive factors of the learning rate; the last
    that matches a parameter counts. One that matches nothing is a ConfigError.
    """
    parameters = NamedParameters(model)
    factors = dict.fromkeys(parameters, 1.0)
    for pattern, factor in lr_scale.items():
        factors |= dict.fromkeys(parameters.matching([pattern], "lr_scale"), factor)
    split = []
    for group in groups:
        by_factor = defaultdict(list)
        for parameter in group["params"]:
            by_factor[factors[parameter]].append(parameter)
        for factor in sorted(by_factor, key=lambda factor: factor != 1.0):  # the first group's rate is the run's
            split.append({**group, "params": by_factor[factor], _LR_SCALE: factor})
    return split


def scale_lr(optimizer: Optimizer) -> Optimizer:
    """Give the groups of an optimizer their share of its learning rate; to be called once, before a schedule."""
    for group in optimizer.param_groups:
        group["lr"] *= group.pop(_LR_SCALE, 1.0)
    return optimizer
