"""What another package may bring, one of each: a configuration reaches them by name, and their arguments as keys."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch.optim import Optimizer

from veomni.accelerators import CPU
from veomni.data import Tokens
from veomni.data.data_type import Plaintext
from veomni.data.sources.formats import RecordFormat
from veomni.loggers import Logger
from veomni.ops.attention.backends import AttentionBackend
from veomni.ops.experts.backends import Loop
from veomni.optim import Shape


class Lion(Optimizer):
    """Sign of an interpolated momentum (Chen et al., arXiv:2302.06675), as its authors' package would have it.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Weights of the momentum in the direction, and in the momentum itself.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        params,
        lr: Annotated[float, Ge(0.0)] = 1e-4,
        betas: tuple[Annotated[float, Lt(1.0)], Annotated[float, Lt(1.0)]] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                direction = (momentum * first + parameter.grad * (1 - first)).sign()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                momentum.mul_(second).add_(parameter.grad, alpha=1 - second)


class InverseSqrt(Shape):
    """The rate of the first Transformer.

    Args:
        offset: Steps that are added to those done.
    """

    def __init__(self, offset: Annotated[int, Ge(1)] = 1):
        self.offset = offset

    def factor(self, step, total_steps, warmup_steps):
        return ((warmup_steps + self.offset) / (step + self.offset)) ** 0.5


class CsvLogger(Logger):
    """A line of comma-separated values per step.

    Args:
        output_dir: The run's directory.
        columns: Metrics that are written.
    """

    name = "csv"

    def __init__(self, output_dir: Path | str, *, columns: list[str] = ["loss"]):  # noqa: B006
        self.path, self.columns = Path(output_dir) / "metrics.csv", columns

    def log(self, metrics, step):
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([step, *(metrics.get(name) for name in self.columns)])


class QuestionAnswer(RecordFormat):
    """A question and its answer.

    Args:
        system: What each conversation begins with; None for nothing.
    """

    keys = ("question", "answer")

    def __init__(self, system: str | None = None):
        self.system = system

    def messages(self, document, key):
        roles = {"user": "question", "assistant": "answer"}
        messages = [{"role": role, "content": document.record[field]} for role, field in roles.items()]
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages


class Reversed(Plaintext):
    """Texts, from the last token to the first.

    Args:
        skip: Tokens left out at the beginning.
    """

    marks = ()

    def __init__(self, skip: Annotated[int, Ge(0)] = 0):
        self.skip = skip

    def encode(self, documents, schema, tokenizer, template):
        encoded = super().encode(documents, schema, tokenizer, template)
        return [[Tokens(tokens.ids[::-1][self.skip :])] for [tokens] in encoded]


class ScaledAttention(AttentionBackend):
    """Eager attention with another temperature.

    Args:
        temperature: What scores are divided by.
    """

    name = "scaled"
    precisions = ("fp64", "fp32")

    def __init__(self, temperature: float = 1.0):
        self.temperature = temperature

    @property
    def function(self):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        def attend(module, query, key, value, mask, **options):
            return sdpa_attention_forward(module, query / self.temperature, key, value, mask, **options)

        return attend


class SlowCPU(CPU):
    """The CPU, with a name of its own.

    Args:
        reserve: Bytes that are left to other programs.
    """

    name = "slow_cpu"

    def __init__(self, reserve: int = 0):
        self.reserve = reserve

    def total_memory(self):
        return super().total_memory() - self.reserve


class LoopedExperts(Loop):
    """Experts one after another, in one precision."""

    precisions = ("fp32",)
