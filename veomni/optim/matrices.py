"""Which parameters are matrices of hidden layers, the ones that Muon is for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from veomni.optim.names import inner_module, matching, parameter_names
from veomni.parallel.wrappers import plain_name

_NO_MATRICES = (
    nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def hidden_matrices(model: nn.Module, *, exclude: Sequence[str] = ()) -> list[nn.Parameter]:
    """Return the trained matrices inside the model's blocks, in its order.

    A block is an element of an ``nn.ModuleList``, so embeddings, heads and projectors outside the repeated layers are
    left out. Inside, a matrix is a two-dimensional parameter called ``weight``, or each slice of a three-dimensional
    one: experts are stacks ``[experts, rows, columns]``. Embeddings, convolutions, biases and what has a side of 1 are
    none. The model must not be wrapped by FSDP1, whose parameters have lost their shapes.

    Args:
        model: The model, before or after a strategy took it over.
        exclude: Shell patterns of parameter or module names that are left out: ``*.router``.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    names = parameter_names(model)
    everyone = [name for aliases in names.values() for name in aliases]
    excluded = matching(everyone, exclude, "exclude")
    inside = _inside_blocks(inner_module(model))
    return [
        parameter
        for parameter, aliases in names.items()
        if parameter.requires_grad and parameter in inside
        if _is_matrix(parameter, aliases[0]) and not excluded.intersection(aliases)
    ]


def _is_matrix(parameter: nn.Parameter, name: str) -> bool:
    named = name.endswith("weight") if parameter.ndim == 2 else not name.endswith("bias")
    return parameter.ndim in (2, 3) and min(parameter.shape[-2:]) > 1 and named


def _inside_blocks(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters under the elements of module lists whose modules can hold matrices."""
    lists = [plain_name(f"{name}.") for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside: set[nn.Parameter] = set()
    outside: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        block = plain_name(f"{name}.").startswith(tuple(lists)) and not isinstance(module, _NO_MATRICES)
        (inside if block else outside).update(module.parameters(recurse=False))
    return inside - outside
