"""Which weights of a model take part in a token's matrix products, and how many numbers of each."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from veomni.metrics.attention_shapes import UncountableError

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


class ActiveWeight(NamedTuple):
    """One parameter as one module uses it.

    Attributes:
        depth: The layer it belongs to; -1 in front of the layers, their number behind them.
        active: Its numbers that one token is multiplied with; 0 for lookups, norms and biases.
        trainable: Whether it is trained.
    """

    depth: int
    active: int
    trainable: bool


def depth_of(name: str, outside: int) -> int:
    """Return the index of the layer that a module or parameter belongs to, or ``outside``."""
    index = _INDEX.search(name)
    return int(index.group(1)) if index else outside


def active_weights(model: nn.Module, config: Any) -> Iterator[ActiveWeight]:
    """Yield every module's own parameters, a tied one once for each module that uses it.

    Args:
        model: A transformers decoder, before sharding; the meta device will do.
        config: The text part of its configuration.

    Raises:
        UncountableError: it is not known how a parameter is used.
    """
    outside = -1
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{key}" if path else key
            depth = depth_of(name, outside)
            outside = config.num_hidden_layers if depth >= 0 else outside
            yield ActiveWeight(depth, _active(name, module, tuple(parameter.shape), config), parameter.requires_grad)


def _active(name: str, module: nn.Module, shape: tuple[int, ...], config: Any) -> int:
    key = name.rpartition(".")[2]
    if len(shape) < 2 or isinstance(module, nn.Embedding) or key.endswith("bias"):
        return 0
    count, used = (_first(config, names) for names in (_EXPERT_COUNTS, _EXPERTS_PER_TOKEN))
    stacked = len(shape) == 3 and shape[0] == count
    if not stacked and (len(shape) != 2 or key != "weight"):
        raise UncountableError(f"it has a parameter {name} of shape {list(shape)}")
    if not stacked and not re.search(r"\bexperts\.\d+\.", name):
        return shape[0] * shape[1]
    if used is None or count is None:
        missing = "a token uses" if used is None else "there are"
        raise UncountableError(f"its configuration does not say how many experts {missing}, of which {name} is one")
    return shape[-2] * shape[-1] * used // (1 if stacked else count)  # stacked, or one module per expert


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
