"""How a model is split: plain data, derived from its modules, read by the strategies."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelPlan:
    """Names of modules, as ``named_modules`` gives them.

    Each of the ``blocks``, the repeated layers in forward order, is a unit of sharding, recomputation and compilation.
    The parameters of ``keep_fp32`` stay in float32 under bf16 (routers, some norms). ``experts`` are modules that hold
    all experts of a layer, every parameter of theirs a stack ``[experts, ...]``. Token ``embeddings`` and ``heads`` are
    gathered when they are used: plain layers, with a weight that nothing else holds.
    """

    blocks: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
