"""How a model is split: plain data, derived from its modules, read by the strategies."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ParallelPlan:
    """Names of modules, as ``named_modules`` gives them.

    Attributes:
        blocks: The repeated layers: each is one unit of sharding, recomputation and compilation, in forward order.
        keep_fp32: Modules whose parameters stay in float32 under bf16 (routers, some norms).
        experts: Modules that hold all experts of a layer, every parameter of theirs a stack ``[experts, ...]``.
    """

    blocks: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = field(default=())
    experts: tuple[str, ...] = field(default=())
