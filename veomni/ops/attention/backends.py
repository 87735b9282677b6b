"""Attention backends by name: what each runs on, and how other packages bring theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from veomni.config.base import Section
from veomni.config.problems import Problem
from veomni.registry import Registry

ATTENTION: Registry[type[AttentionBackend]] = Registry(
    "attention", group="veomni.attention", home="veomni.ops.attention.backends"
)
"""Attention backends by the names that configurations use."""


class AttentionBackend:
    """One way of computing attention, with the precisions and device types (None is all) that it runs in and on.

    A third-party backend subclasses this, sets ``function``, and names itself in the entry-point group
    ``veomni.attention``; its constructor's arguments are its options. ``mask`` is the backend of transformers whose
    masks it takes.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("fp64", "fp32", "bf16")
    devices: ClassVar[tuple[str, ...] | None] = None
    mask: ClassVar[str] = "sdpa"

    @property
    def function(self) -> Callable[..., Any] | None:
        """What transformers' attention interface calls; None where transformers, or this package, registers it.

        It is ``f(module, query, key, value, mask, **options)``, with query ``[batch, heads, seq, head_dim]``, key and
        value ``[batch, kv_heads, seq, head_dim]``, and returns ``[batch, seq, heads, head_dim]``, and None for weights.
        """
        return None

    @classmethod
    def config_problems(cls, options: Section, config: Any, world: int | None) -> Iterator[Problem]:
        """Yield why this backend cannot run in a configuration: another precision or device."""
        precision, device = config.train.precision, config.train.accelerator.chosen
        if precision not in cls.precisions:
            others = ", ".join(name for name in ATTENTION if precision in ATTENTION.get(name).precisions)
            problem = f"model.attention {cls.name} does not compute in {precision}"
            yield Problem(problem, f"use one of {others}, or train.precision {cls.precisions[-1]}")
        elif device != "auto" and cls.devices is not None and device not in cls.devices:
            yield Problem(f"model.attention {cls.name} does not run on accelerator {device}", "use auto, eager or sdpa")


_KERNELS = {"precisions": ("bf16",), "devices": ("cuda", "npu")}
_BUILT_IN: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("auto", "eager", "sdpa")},
    "flex_attention": {"precisions": ("fp32", "bf16")},
    **dict.fromkeys(("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"), _KERNELS),
}
for _name, _facts in _BUILT_IN.items():
    _own = {"__doc__": f"{_name}.", "__module__": __name__, "name": _name, **_facts}
    ATTENTION.register(_name)(type(_name, (AttentionBackend,), _own))
