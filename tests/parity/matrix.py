"""Every pair of what a step can be composed of: how parameters, rows and experts are laid out, of which model, and how.

A case is one step on some ranks; all cases of one number of ranks run in the same forked processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.models.tiny import tiny_config
from tests.pairwise import Matrix, Rule
from veomni.strategies import (
    DDP,
    FSDP1,
    FSDP2,
    ActivationCheckpointing,
    Compile,
    ContextParallel,
    ExpertParallel,
    Single,
    TiledMLP,
    Ulysses,
)  # fmt: skip
from veomni.strategies.transforms.precision import select_precision
from veomni.testing.documents import global_rows
from veomni.testing.oracle import BOUNDS
from veomni.testing.step import Outcome, train_step

PARAMETERS: dict[str, Any] = {
    "single": Single,
    "ddp": DDP,
    "fsdp1": FSDP1,
    "fsdp1_grad_op": partial(FSDP1, sharding="grad_op"),
    "fsdp1_hybrid": partial(FSDP1, replicate=2),
    "fsdp2": FSDP2,
    "fsdp2_hybrid": partial(FSDP2, replicate=2),
    "fsdp2_keep_gathered": partial(FSDP2, reshard_after_forward=False, reshard_after_backward=False, prefetch=1),
    "fsdp2_offload": partial(FSDP2, cpu_offload=True),
}
ROWS: dict[str, tuple[Any, ...]] = {
    "whole": (),
    "ulysses2": (partial(Ulysses, 2),),
    "ulysses4": (partial(Ulysses, 4),),
    "async2": (partial(Ulysses, 2, overlap=True),),
    "async4": (partial(Ulysses, 4, overlap=True),),
    "ring2": (partial(ContextParallel, 2),),
    "ring4": (partial(ContextParallel, 4),),
    "ring2_ulysses2": (partial(ContextParallel, 2), partial(Ulysses, 2)),
    "ring2_async2": (partial(ContextParallel, 2), partial(Ulysses, 2, overlap=True)),
}
EXPERTS: dict[str, tuple[Any, ...]] = {
    "together": (),
    "ep2": (partial(ExpertParallel, 2),),
    "ep2_chunks": (partial(ExpertParallel, 2, chunks=2),),
    "ep2_fixed": (partial(ExpertParallel, 2, exchange="fixed"),),
    "ep2_strided": (partial(ExpertParallel, 2, placement="strided"),),
    "ep4_chunks": (partial(ExpertParallel, 4, chunks=2),),
    "ep4_fixed": (partial(ExpertParallel, 4, chunks=3, exchange="fixed"),),
}
DENSE = ["qwen3", "llama", "gemma3_text"]
SPARSE = ["qwen3_moe", "gpt_oss", "qwen2_moe", "mixtral", "deepseek_v3", "glm4_moe", "olmoe", "minimax"]
FUSED_PROJECTIONS = ("deepseek_v3", "olmoe")  # low-rank, or normalised over all heads: exchanges cannot overlap

BLOCKS: dict[str, tuple[Any, ...]] = {
    "plain": (),
    "full": (ActivationCheckpointing,),
    "selective": (partial(ActivationCheckpointing, "selective"),),
    "offloaded": (partial(ActivationCheckpointing, offload=True),),
    "tiled": (partial(TiledMLP, 5),),
}
WITH_MLPS = [*DENSE, "qwen2_moe", "deepseek_v3", "glm4_moe"]
COMPILE = partial(Compile, "aot_eager")  # what Dynamo and autograd make of blocks, without making kernels

PRECISIONS: dict[str, Any] = {
    "fp64": "fp64", "fp32": "fp32", "bf16": "bf16", "bf16_sums": select_precision("bf16", reduce="bf16"),
}  # fmt: skip
MAX_NORM = 0.01
"""Every step clips its gradients to it, after they have been compared."""

# A choice is discrete: a token for which rounding changes it has other gradients. In these models, none has.
STABLE_CHOICES = {("qwen3_moe", "fp32"), ("olmoe", "bf16"), ("glm4_moe", "bf16")}


def _size(strategies: tuple[Any, ...]) -> int:
    return math.prod(strategy.args[0] for strategy in strategies)


def _fits(parameters: str, rows: str, experts: str, ranks: int) -> bool:
    if parameters == "single":
        return ranks == 1 and experts == "together" and rows == "whole"
    replicas, least = (2, 4) if "hybrid" in parameters else (1, 1 if "fsdp2" in parameters else 2)
    return ranks >= least and ranks % (replicas * _size(ROWS[rows])) == 0 and ranks % _size(EXPERTS[experts]) == 0


def matrix(ranks: tuple[int, ...], precisions: tuple[str, ...]) -> Matrix:
    """Return the matrix of steps on these numbers of ranks, with the layouts that one of them fits."""
    return Matrix(
        {
            "parameters": [one for one in PARAMETERS if any(_fits(one, "whole", "together", size) for size in ranks)],
            "rows": [one for one in ROWS if any(_fits("fsdp2", one, "together", size) for size in ranks)],
            "experts": [one for one in EXPERTS if any(_fits("fsdp2", "whole", one, size) for size in ranks)],
            "model": DENSE + SPARSE, "ranks": ranks, "precision": precisions, "blocks": list(BLOCKS),
            "compiled": (False, True), "accumulation": (1, 3), "weighted": (False, True),
        },
        RULES,
        {("compiled", True): 4},
    )  # fmt: skip


RULES = [
    Rule(("parameters", "rows", "experts", "ranks"), _fits),
    Rule(("experts", "model"), lambda experts, model: experts == "together" or model in SPARSE),
    Rule(("rows", "model"), lambda rows, model: not ("ring" in rows and model == "gpt_oss")),  # its sinks
    Rule(("rows", "model"), lambda rows, model: not ("async" in rows and model in FUSED_PROJECTIONS)),
    Rule(("blocks", "model"), lambda blocks, model: blocks != "tiled" or model in WITH_MLPS),
    Rule(("compiled", "precision"), lambda compiled, precision: not (compiled and precision == "fp64")),
    Rule(("model", "precision"), lambda model, precision: (
        precision == "fp64" or model in DENSE or (model, precision) in STABLE_CHOICES
    )),
]  # fmt: skip
MATRIX = matrix((1, 2, 4), tuple(PRECISIONS))


@dataclass(frozen=True)
class Case:
    """One step."""

    parameters: str
    rows: str
    experts: str
    model: str
    ranks: int
    precision: str
    blocks: str
    compiled: bool
    accumulation: int
    weighted: bool

    def __str__(self) -> str:
        parts = (self.parameters, self.rows, self.experts, self.model, self.ranks, self.precision, self.blocks)
        return "-".join(
            [*map(str, parts), *["compiled"] * self.compiled, f"x{self.accumulation}", *["weighted"] * self.weighted]
        )

    def strategies(self) -> list[Any]:
        beside = (make() for make in (*EXPERTS[self.experts], *ROWS[self.rows], *BLOCKS[self.blocks]))
        return [PARAMETERS[self.parameters](), *beside, *[COMPILE()] * self.compiled]

    @property
    def bound(self) -> float:
        """What it may be off by, relative."""
        return BOUNDS[self.precision.partition("_")[0]]

    def run(self, **options: Any) -> Outcome:
        """``options`` are those of ``train_step``, and its launcher's."""
        config = tiny_config(self.model)
        return train_step(
            config, self.strategies, rows=global_rows(config.vocab_size, weighted=self.weighted),
            accumulation=self.accumulation, precision=PRECISIONS[self.precision], max_norm=MAX_NORM, **options,
        )  # fmt: skip


def plain(parameters: str, ranks: int, model: str = "qwen3", *, rows: str = "whole", experts: str = "together") -> Case:
    """Return a case in fp64 with three micro-batches and nothing else."""
    return Case(parameters, rows, experts, model, ranks, "fp64", "plain", False, 3, False)


SEEDED = [
    plain("single", 1), plain("ddp", 2), plain("fsdp1", 2), plain("fsdp2", 2), plain("fsdp2_hybrid", 4),
    plain("fsdp2", 4, "qwen3_moe", experts="ep2"), plain("fsdp1", 2, "qwen3_moe", experts="ep2"),
    plain("fsdp2_hybrid", 4, "qwen3_moe", experts="ep2"), plain("fsdp2", 4, "qwen3_moe", experts="ep4_chunks"),
    plain("fsdp2", 2, "qwen3_moe", experts="ep2"), plain("fsdp2", 2, rows="ulysses2"),
    plain("fsdp2", 4, rows="ring2_ulysses2"), plain("fsdp2", 4, "olmoe", experts="ep2"),
]  # fmt: skip
"""Bugs are seeded in these (``bugs.py``): that they pass without a bug is their place in the matrix."""

CASES = [Case(**case) for case in MATRIX.cover([vars(case) for case in SEEDED])]
