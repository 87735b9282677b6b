"""The transform that runs dense MLPs over tiles of tokens."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge
from torch import Tensor, nn
from typing_extensions import override

from veomni.config.section import Validated
from veomni.errors import ModelError
from veomni.models.traits.tokenwise import copy_with, find_mlps
from veomni.models.weights.slots import on_meta, slots
from veomni.ops.tiles import register_structure, run_in_tiles
from veomni.strategies.base import SetupContext, Stage, Strategy

if TYPE_CHECKING:
    from veomni.models.adapter.adapter import ModelAdapter


@dataclass(eq=False)
class TiledMLP(Validated, Strategy):
    """Run the dense MLPs of every block over tiles of tokens, each recomputed in the backward.

    Intermediate activations exist for one tile at a time: for rows so long that one block's MLP fills the device.

    Args:
        tokens: Tokens of a tile.
    """

    name = "tiled_mlp"
    stage = Stage.TILES

    tokens: Annotated[int, Ge(1)] = 8192

    @override
    def transform(self, adapter: ModelAdapter, context: SetupContext) -> None:
        names = list(find_mlps(adapter.model, context.plan))
        if not names:
            name = type(adapter.model).__name__
            problem = f"{name} has no dense MLP, not in float8, that computes each token independently"
            fix = "leave TiledMLP out, or exclude the layers of MLPs from Float8; a budget of activations may be larger"
            raise ModelError(problem, fix, "TiledMLP.tokens")
        for name in names:
            mlp = adapter.model.get_submodule(name)
            adapter.patch(mlp, "forward", tiled(mlp, self.tokens))


def tiled(mlp: nn.Module, tokens: int) -> Callable[[Tensor], Tensor]:
    """Return a forward of ``mlp`` that maps ``[..., width]`` to the same shape, ``tokens`` tokens at a time."""
    structure = register_structure(copy_with(mlp, {each: on_meta(each) for each in mlp.parameters()}))
    tile = min(tokens, sys.maxsize)
    places = {slot.tensor: (slot.module, slot.key) for slot in slots(mlp)}.values()  # a tied weight once

    @functools.wraps(mlp.forward)
    def run(hidden: Tensor) -> Tensor:
        weights = [getattr(module, key) for module, key in places]
        rows = hidden.reshape(-1, hidden.shape[-1])
        return run_in_tiles(rows, weights, structure, tile).view_as(hidden)

    return run
