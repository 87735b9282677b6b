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
    """One way of computing attention.

    A third-party backend subclasses this, sets ``function``, and names itself in the entry-point group
    ``veomni.attention``; its constructor's arguments are its options.

    Attributes:
        name: What configurations and transformers call it.
        precisions: Precisions it computes in.
        devices: Device types it runs on; None is all.
        mask: Backend of transformers whose masks it takes.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("fp64", "fp32", "bf16")
    devices: ClassVar[tuple[str, ...] | None] = None
    mask: ClassVar[str] = "sdpa"

    @property
    def function(self) -> Callable[..., Any] | None:
        """What transformers' attention interface calls: ``f(module, query, key, value, mask, **options)``.

        Query, key and value are ``[batch, heads, seq, head_dim]``, the output ``[batch, seq, heads, head_dim]``. None
        where transformers, or this package, registers it.
        """
        return None

    @classmethod
    def config_problems(cls, options: Section, config: Any, world: int | None) -> Iterator[Problem]:
        """Yield why this backend cannot run in a configuration: another precision or device."""
        precision, device = config.train.precision, config.train.accelerator.chosen
        if precision not in cls.precisions:
            yield Problem(
                f"model.attention {cls.name} does not compute in {precision}",
                f"use one of {', '.join(_alternatives(precision))}, or train.precision {cls.precisions[-1]}",
            )
        elif device != "auto" and cls.devices is not None and device not in cls.devices:
            yield Problem(f"model.attention {cls.name} does not run on accelerator {device}", "use auto, eager or sdpa")


def _alternatives(precision: str) -> list[str]:
    return [name for name in ATTENTION if precision in ATTENTION.get(name).precisions]


def _built_in(name: str, precisions: tuple[str, ...], devices: tuple[str, ...] | None) -> None:
    facts = {"__doc__": f"{name}.", "__module__": __name__, "name": name, "precisions": precisions, "devices": devices}
    ATTENTION.register(name)(type(name, (AttentionBackend,), facts))


_ACCELERATED = ("cuda", "npu")
for _name in ("auto", "eager", "sdpa"):
    _built_in(_name, ("fp64", "fp32", "bf16"), None)
_built_in("flex_attention", ("fp32", "bf16"), None)
for _name in ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"):
    _built_in(_name, ("bf16",), _ACCELERATED)
