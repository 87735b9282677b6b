"""A trial: a small copy of a model that traits may run and change, discarded when the examination ends.

The copy is the whole model where that is small, and otherwise the same class built from a shrunk configuration. A model
that is too large and was changed after it was built has no such copy; then the model itself is run, after it has been
sharded and has its values, and is left as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from veomni.batch.documents import RowLayout
from veomni.batch.micro_batch import MicroBatch
from veomni.batch.split import SequenceShard
from veomni.errors import ModelError
from veomni.models.skeleton import skeleton_of
from veomni.models.traits.attention import on_cpu, register_attentions
from veomni.models.traits.inputs import tokens_of
from veomni.models.traits.shrink import shrunk_copy
from veomni.models.traits.verdict import Verdict
from veomni.models.transformers_api.attention import text_attention_of
from veomni.models.weights.initialize import Initializer
from veomni.models.weights.slots import slots
from veomni.ops.attention.whole_rows import UNSPLIT_ATTENTION, use_attention

TINY, SMALL = 1_000_000, 20_000_000
"""Elements of a model that is copied whole, and of one that is where it cannot be shrunk: in a deep model with random
weights the influence of a token vanishes."""
_CPU = torch.device("cpu")


class NoCopyError(Exception):
    """A model cannot be copied small; the message says why."""


class Trial:
    """One model under examination.

    Args:
        subject: The real model, to be read only.
        itself: What users call, the real model's body inside and its device, where the model itself is run.
    """

    def __init__(self, subject: nn.Module, *, itself: tuple[nn.Module, torch.device] | None = None) -> None:
        self.subject, self._itself = subject, itself

    @property
    def name(self) -> str:
        """The class of the model."""
        return type(self.subject).__name__

    @property
    def device(self) -> torch.device:
        """Where the trial runs."""
        return _CPU if self._itself is None else self._itself[1]

    @cached_property
    def body(self) -> Any:
        """The module to examine: a copy with values, or the model itself.

        Raises:
            NoCopyError: there is no copy.
        """
        return self.subject if self._itself is not None else copy_with_values(self.subject)

    def takes(self, *names: str) -> bool:
        """Whether the forward of the model has parameters of these names."""
        return set(names) <= inspect.signature(type(self.subject).forward).parameters.keys()

    def tokens(self) -> tuple[Tensor, int]:
        """Return a row of ordinary tokens, int64 ``[seq]``, and a token that is not in it."""
        return tokens_of(self.body.config, self.device)

    def outputs(self, tokens: Tensor, positions: Tensor, shards: int = 1, **inputs: Any) -> Tensor:
        """Run one row and return ``[seq, channels]``: logits, or hidden states of a model without a head.

        Args:
            tokens: int64 ``[seq]``.
            positions: int64 ``[seq]``.
            shards: Ranks that share the row, of which these tokens are one's.
            inputs: What else the model is given.
        """
        model = self.body if self._itself is None else self._itself[0]
        given = {"input_ids": tokens[None], "position_ids": positions[None], "use_cache": False, **inputs}
        micro = MicroBatch(given, RowLayout(shard=SequenceShard(shards)))
        output = model(**micro.inputs)
        logits = getattr(output, "logits", None)
        values: Tensor = output[0] if logits is None else logits
        return values[0]

    @contextmanager
    def attention(self, name: str | None = None) -> Iterator[None]:
        """Run the text part with the attention called ``name``; None is its own, on rows that are not sharded."""
        register_attentions()
        installed = text_attention_of(self.body)
        if name is None:
            name = getattr(self.subject, UNSPLIT_ATTENTION, installed) if self._itself else on_cpu(installed)
        use_attention(self.body, name)
        try:
            yield
        finally:
            use_attention(self.body, installed)

    def attempt(self, examine: Callable[[Trial], Verdict], problem: str) -> Verdict:
        """Return the verdict of ``examine``, run without gradients, compiled code or a trace in the random state.

        Args:
            examine: May raise whatever the model's forward raises.
            problem: The reason of the verdict where the model does not run.

        Raises:
            NoCopyError: the copy does not run.
        """
        model = self.body if self._itself is None else self._itself[0]
        training = model.training
        devices = [] if self.device.type == "cpu" else [self.device]
        eager = nullcontext() if self._itself is None else torch.compiler.set_stance("force_eager")
        try:
            with torch.no_grad(), eager, torch.random.fork_rng(devices=devices):
                torch.default_generator.manual_seed(0)
                model.eval()
                return examine(self)
        except ModelError as error:
            return Verdict(False, error.problem)
        except Exception as error:  # whatever a model's own forward raises
            reason = f"{problem} ({type(error).__name__}: {str(error)[:160]})"
            if self._itself is None:
                raise NoCopyError(reason) from error
            return Verdict(False, reason)
        finally:
            model.train(training)


def copy_with_values(model: nn.Module) -> nn.Module:
    """Return a small copy of a transformers model on the CPU, in float32, with random values.

    Raises:
        NoCopyError: it is too large, and its configuration does not describe it or cannot be shrunk.
    """
    from veomni.models.adapter.passes.documents import isolate_documents  # it imports this package

    replaced = next((name for name, module in model.named_modules() if "forward" in vars(module)), None)
    if replaced is not None:
        raise NoCopyError(f"the forward of {replaced or 'the model'} was replaced after it was built")
    elements = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    try:
        copy = skeleton_of(model) if elements <= TINY else _shrunk_or_whole(model, elements)
        from veomni.models.adapter.passes.documents import isolate_documents  # it imports the traits

        isolate_documents(copy)
        _fill(copy)
    except Exception as error:
        raise NoCopyError(f"{type(error).__name__}: {str(error)[:160]}") from error
    return copy.eval()


def _shrunk_or_whole(model: nn.Module, elements: int) -> nn.Module:
    try:
        return shrunk_copy(model, SMALL)
    except ValueError:
        if elements > SMALL:
            raise
        return skeleton_of(model)


def _fill(copy: nn.Module) -> None:
    """Give a copy on the meta device values: random parameters, and the buffers that its class sets."""
    generator = torch.Generator().manual_seed(0)
    buffers = dict(copy.named_buffers(remove_duplicate=False))
    made: dict[int, Tensor] = {}
    for group in Initializer(copy, _CPU, seed=0).values(buffers):
        made |= {id(buffers[name]): value for name, value in group.items() if name in buffers}
    for slot in slots(copy):
        meta = slot.tensor
        if id(meta) not in made:
            made[id(meta)] = nn.Parameter(_random(meta, generator), meta.requires_grad)
        slot.put(made[id(meta)])


def _random(parameter: Tensor, generator: torch.Generator) -> Tensor:
    # Large enough for attention that distinguishes tokens; vectors are near one, as norms' are.
    values = torch.randn(parameter.shape, generator=generator)
    return values / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + 0.2 * values
