"""Parameters that are not trained."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from veomni.errors import ModelError
from veomni.registry import did_you_mean


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop gradients of the parameters that match and return their names; before a strategy shards the model.

    Patterns are shell patterns of parameter or module names: ``model.visual`` or ``*.mlp.gate.*``. One that matches
    nothing is a ModelError.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        matched = [name for name in parameters if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not matched:
            known = [*parameters, *(name for name, _ in model.named_modules() if name)]
            fix = did_you_mean(pattern, known, otherwise="look the names up with model.named_parameters()")
            raise ModelError(f"no parameter matches {pattern!r}, which is to be frozen", fix)
        frozen |= {name: parameters[name] for name in matched}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return list(frozen)
