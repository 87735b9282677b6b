"""Traits of models, and the trial that one is examined in: a small copy that may be run and changed.

The copy is the whole model, or of a large one the same class with a shrunk configuration. A large model that was
changed after it was built has none; then the model itself is run once it has its values, and is left as it was.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from veomni.batch.documents import RowLayout
from veomni.batch.micro_batch import MicroBatch
from veomni.batch.split import SequenceShard
from veomni.errors import ModelError
from veomni.models.traits.attention import LENGTH, on_cpu, register_attentions
from veomni.models.traits.shrink import shrunk_copy
from veomni.models.transformers_api.attention import text_attention_of
from veomni.models.weights.initialize import Initializer
from veomni.models.weights.slots import skeleton_of, slots
from veomni.ops.attention.whole_rows import UNSPLIT_ATTENTION, use_attention

TINY, SMALL = 1_000_000, 20_000_000
"""Elements of a model that is copied whole, and of one that is where it cannot be shrunk: in a deep model with random
weights the influence of a token vanishes."""
_CPU = torch.device("cpu")
_SPECIAL = ("_token_id", "_token_index")


class NoCopyError(Exception):
    """A trait can be examined on the model itself only; the message says why, unless that is true of any model."""


@dataclass(frozen=True)
class Verdict:
    """The result of one examination.

    ``reason`` is why a model has the trait not, or on what the verdict rests where that is not a copy of the whole
    model; ``found``, what there is where a trait is more than yes or no; ``fix``, what to change instead of the trait's
    own fix.
    """

    ok: bool
    reason: str = ""
    found: Any = None
    fix: str = ""


class Trial:
    """One model under examination on ``device``; ``subject`` is the real model's body, to be read only.

    ``itself`` is what users call, where the model itself is run instead of a copy.
    """

    def __init__(self, subject: nn.Module, itself: nn.Module | None = None, device: torch.device = _CPU) -> None:
        self.subject, self.itself, self.device = subject, itself, device
        self.name = type(subject).__name__

    @cached_property
    def body(self) -> Any:
        """The module to examine: a copy with values (NoCopyError where there is none), or the model itself."""
        return copy_with_values(self.subject) if self.itself is None else self.subject

    def takes(self, *names: str) -> bool:
        """Whether the forward of the model has parameters of these names."""
        return set(names) <= inspect.signature(type(self.subject).forward).parameters.keys()

    def tokens(self) -> tuple[Tensor, int]:
        """Return ``LENGTH`` tokens, int64, and another; different, and none special: a placeholder needs an image."""
        config = self.body.config
        facts = {**config.get_text_config().to_dict(), **config.to_dict()}
        special = {value for name, value in facts.items() if name.endswith(_SPECIAL) and isinstance(value, int)}
        vocabulary = range(config.get_text_config().vocab_size)
        ordinary = [token for token in vocabulary[3:] if token not in special] or vocabulary
        *tokens, other = (ordinary[7 * place % len(ordinary)] for place in range(LENGTH + 1))
        return torch.tensor(tokens, device=self.device), other

    def outputs(self, tokens: Tensor, positions: Tensor, shards: int = 1, **inputs: Any) -> Tensor:
        """Run a row of int64 ``[seq]`` that ``shards`` ranks share; returns logits or hidden ``[seq, channels]``."""
        given = {"input_ids": tokens[None], "position_ids": positions[None], "use_cache": False, **inputs}
        micro = MicroBatch(given, RowLayout(shard=SequenceShard(shards)))
        output = (self.itself or self.body)(**micro.inputs)
        logits = getattr(output, "logits", None)
        return (output[0] if logits is None else logits)[0]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run without gradients and compiled code, a model itself in evaluation; the random state stays."""
        training = self.subject.training
        eager = nullcontext() if self.itself is None else torch.compiler.set_stance("force_eager")
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.no_grad(), eager, torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            torch.default_generator.manual_seed(0)
            if self.itself is not None:
                self.itself.eval()
            try:
                yield
            finally:
                if self.itself is not None:
                    self.itself.train(training)

    @contextmanager
    def attention(self, name: str | None = None) -> Iterator[None]:
        """Run the text part with the attention called ``name``; None is its own, on rows that are not sharded."""
        register_attentions()
        installed = text_attention_of(self.body)
        if name is None:
            name = on_cpu(installed) if self.itself is None else getattr(self.subject, UNSPLIT_ATTENTION, installed)
        use_attention(self.body, name)
        try:
            yield
        finally:
            use_attention(self.body, installed)

    def attempt(self, examine: Callable[[Self], Verdict], problem: str) -> Verdict:
        """Return the verdict of ``examine``; a model that does not run has ``problem``, and a copy no verdict."""
        try:
            return examine(self)
        except ModelError as error:
            return Verdict(False, error.problem, fix=error.fix)
        except Exception as error:  # whatever a model's own forward raises
            reason = f"{problem} ({type(error).__name__}: {str(error)[:160]})"
            if self.itself is None:
                raise NoCopyError(reason) from error
            return Verdict(False, reason)


class Trait(Protocol):
    """A property of a model that strategies and passes depend on; an instance holds no state.

    ``says`` completes "a model that ..."; ``fix`` is what to change where a model lacks it.
    """

    says: ClassVar[str]
    fix: ClassVar[str]

    def examine(self, trial: Trial) -> Verdict:
        """Examine the model of a trial; NoCopyError where it has to be run, and no small copy runs."""
        ...


def copy_with_values(model: nn.Module) -> nn.Module:
    """Return a small copy of a transformers model on the CPU, in float32, with random values.

    A NoCopyError where it is too large, and its configuration does not describe it or cannot be shrunk.
    """
    from veomni.models.adapter.passes.documents import isolate_documents  # it imports the traits

    replaced = next((name for name, module in model.named_modules() if "forward" in vars(module)), None)
    if replaced is not None:
        raise NoCopyError(f"the forward of {replaced or 'the model'} was replaced after it was built")
    elements = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    try:
        copy = skeleton_of(model) if elements <= TINY else _shrunk_or_whole(model, elements)
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
            # Large enough for attention that distinguishes tokens; vectors are near one, as norms' are.
            values = torch.randn(meta.shape, generator=generator)
            values = values / meta.shape[-1] ** 0.5 if meta.dim() > 1 else 1 + 0.2 * values
            made[id(meta)] = nn.Parameter(values, meta.requires_grad)
        slot.put(made[id(meta)])
