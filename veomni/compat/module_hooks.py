"""Hooks of a copied module, which were made for the forwards of another."""

from __future__ import annotations

from torch import nn

from veomni.compat.private_name import PrivateName

PRIVATE = (
    PrivateName("torch.nn:Module()._forward_hooks", "removes hooks that a copy came with", "AttributeError"),
    PrivateName("torch.nn:Module()._forward_pre_hooks", "removes hooks that a copy came with", "AttributeError"),
)


def clear_hooks(copy: nn.Module) -> None:
    """Remove the forward hooks of a copied module and of all modules in it."""
    for module in copy.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
