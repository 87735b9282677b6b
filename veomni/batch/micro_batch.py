"""One forward and backward: what a loader yields a list of for every optimizer step."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from veomni.batch.documents import RowLayout, keep_boundaries, located_row_lengths
from veomni.batch.fields import holder_of
from veomni.batch.split import SequenceShard, digest_of, row_shape, split_fields
from veomni.errors import DataError

_LAYOUT = "veomni_micro_batch"


@runtime_checkable
class _Movable(Protocol):
    def to(self, device: Any) -> Any: ...


@runtime_checkable
class _Pinnable(Protocol):
    def pin_memory(self) -> Any: ...


@dataclass(frozen=True)
class Targets:
    """What the loss reads beside labels, which models do not take.

    Attributes:
        loss_weights: Weight of every token's loss, float32 ``[batch, seq]``, aligned with ``shift_labels`` where there
            are any, else with ``labels``; not read where those are ``IGNORE_INDEX``, and 1 in padding. None weighs
            every supervised token 1.
        source_ids: Source of every token of a mixture, int64 ``[batch, seq]``, -1 in padding. It is aligned with the
            shifted labels as well, since the first token of a document is unsupervised.
    """

    loss_weights: Tensor | None = None
    source_ids: Tensor | None = None


@dataclass(frozen=True)
class Origin:
    """Where the documents of a micro-batch come from.

    Attributes:
        document_ids: Of a stream, epoch and place of each document, ``"0/train.jsonl, byte 0"``, and which piece or
            which side of a preference pair it is.
        document_sources: Of a mixture, the index in ``source_names`` of each document's source.
        source_names: Names of the mixture's sources, the same in every batch.
    """

    document_ids: tuple[str, ...] = ()
    document_sources: tuple[int, ...] = ()
    source_names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward and backward: ``model(*micro.args, **micro.inputs)``.

    Inputs have transformers' names. Of packed text, ``input_ids``, ``labels`` and ``position_ids`` are int64
    ``[batch, seq]``; positions restart at 0 with every document; labels are unshifted, ``IGNORE_INDEX`` at unsupervised
    tokens and at the first token of every document. ``cu_seq_lens_q`` and ``cu_seq_lens_k``, int32 ``[documents + 1]``,
    are offsets into the ``batch * seq`` flattened tokens of whole rows, the padded tail of a row being one more
    document; ``max_length_q`` and ``max_length_k``, int, an upper bound of the longest. They are left out where every
    row is one document: dense kernels are faster then. Where ranks share a row (``veomni/batch/split.py``), the first
    three hold this rank's shard, and ``shift_labels``, shifted on the whole row, is what the loss is taken on.

    Attributes:
        inputs: The model's keyword arguments, and nothing else.
        rows: Documents and padding of its rows, and which positions this rank holds.
        targets: What the loss reads beside labels.
        origin: Where its documents come from.
        args: The model's positional arguments, of loaders that yield tuples or tensors.
        samples: How many samples were collated; None counts rows. 0 marks a filler, which weighs nothing.
        index: Its place in the step.
        weight: What its loss is a mean over on this rank (weighted supervised tokens, labels or rows); set by
            ``Launcher.accumulate``.
        last: Whether gradients are synchronised in its backward.
        owner: The part of a step that it belongs to (:class:`~veomni.loop.step.ModelStep`).
    """

    inputs: Mapping[str, Any] = field(default_factory=dict)
    rows: RowLayout = field(default_factory=RowLayout)
    targets: Targets = field(default_factory=Targets)
    origin: Origin = field(default_factory=Origin)
    args: tuple[Any, ...] = ()
    samples: int | None = None
    weight: float = 0.0
    index: int = 0
    last: bool = True
    owner: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Describe rows and targets on the tensors themselves, where :meth:`of_call` finds them."""
        tensors = [value for value in self.inputs.values() if isinstance(value, Tensor)]
        description = replace(self, inputs={}, owner=None) if tensors else None
        for tensor in tensors:
            setattr(tensor, _LAYOUT, description)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # tensors lose their attributes between processes

    @classmethod
    def of(cls, batch: Any, *, samples: int | None = None) -> Self:
        """Return what a loader yields for one forward as a micro-batch.

        That is a micro-batch; a mapping, dataclass or NamedTuple of keyword arguments, whose fields that models do not
        take (``loss_weights``, ``source_ids``) are kept apart; a tuple or list of positional arguments; or one such
        argument: a tensor, nested or not, or an object with a method ``to(device)``. Others are a DataError.
        """
        if isinstance(batch, cls):
            return batch if samples is None else replace(batch, samples=samples)
        named = _named(batch)
        if named is not None:
            return cls.of_fields(named, samples=samples)
        if isinstance(batch, (tuple, list)):
            return cls(args=tuple(batch), samples=samples)
        if isinstance(batch, _Movable):
            return cls(args=(batch,), samples=samples)
        raise DataError(
            f"a loader yielded a {type(batch).__name__}: {str(batch)[:80]!r}",
            "yield a dict, dataclass or NamedTuple of keyword arguments, a tuple of positional arguments, or a tensor",
        )

    @classmethod
    def of_fields(cls, values: Mapping[str, Any], rows: RowLayout | None = None, **others: Any) -> Self:
        """Return a micro-batch of fields by name, each held where the table of fields says.

        Where ``rows`` is None, every row is one document. ``others`` are further attributes.
        """
        held: dict[str, dict[str, Any]] = {"inputs": {}, "targets": {}, "rows": {}}
        for name, value in values.items():
            held[holder_of(name)][name] = value
        inputs = held["inputs"]
        rows = RowLayout.of(inputs, **held["rows"]) if rows is None else replace(rows, **held["rows"])
        return cls(inputs, rows, Targets(**held["targets"]), **others)

    @classmethod
    def of_call(cls, kwargs: Mapping[str, Any]) -> Self | None:
        """Return the micro-batch that a model is called with, without its inputs; None for other arguments.

        The tensors hold it. So the layout of rows reaches every model that is called with them, a teacher as well as
        the trained model, without being an argument; several may be in use at a time.
        """
        tensors = (value for value in kwargs.values() if isinstance(value, Tensor))
        return next((getattr(tensor, _LAYOUT) for tensor in tensors if hasattr(tensor, _LAYOUT)), None)

    def fields(self) -> dict[str, Any]:
        """Return all fields by name, wherever they are held."""
        beside = {**vars(self.targets), "position_fractions": self.rows.position_fractions}
        return {**self.inputs, **{name: value for name, value in beside.items() if value is not None}}

    def __getitem__(self, name: str) -> Any:
        return self.fields()[name]

    def __contains__(self, name: object) -> bool:
        return name in self.fields()

    def __iter__(self) -> Iterator[str]:
        raise TypeError("a MicroBatch is not iterable: its keyword arguments are in .inputs, its fields in .fields()")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in it: a filler, or rows of padding alone."""
        return self.samples == 0 or (self.rows.row_lengths is not None and not self.rows.document_lengths)

    def map(self, kind: type, change: Callable[[Any], Any]) -> Self:
        """Return this micro-batch with ``change`` applied to everything of a type in it, also inside collections."""
        change_all = partial(apply_to_collection, dtype=kind, function=change, allow_frozen=True)
        return replace(
            self,
            inputs=change_all(self.inputs),
            args=change_all(self.args),
            rows=replace(self.rows, position_fractions=change_all(self.rows.position_fractions)),
            targets=Targets(change_all(self.targets.loss_weights), change_all(self.targets.source_ids)),
        )

    def to(self, device: torch.device | str) -> Self:
        """Return this micro-batch on ``device``; copies from pinned memory do not block.

        The host examines whether rows are packed, for which a forward would have to wait for the device.
        """

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value.to(device)

        moved, positions = self.map(_Movable, move), self.inputs.get("position_ids")
        known = "cu_seq_lens_q" in self.inputs or self.rows.shard.size > 1
        if isinstance(positions, Tensor) and positions.device.type == "cpu" and not known:
            keep_boundaries(positions, moved.inputs["position_ids"])
        return moved

    def pin_memory(self) -> Self:
        """Return this micro-batch in page-locked memory; what is on a device, nested or sparse stays as it is."""

        def pin(value: Any) -> Any:
            if isinstance(value, Tensor) and (value.device.type != "cpu" or value.layout is not torch.strided):
                return value
            return value.pin_memory()

        return self.map(_Pinnable, pin)

    def split(self, shard: SequenceShard) -> Self:
        """Return the shard of one of the ranks that share its rows; see :func:`~veomni.batch.split.split_fields`."""
        if shard == self.rows.shard:
            return self
        if self.rows.shard.size > 1 or self.args:
            raise DataError(
                f"a micro-batch of {'positional arguments' if self.args else 'row shards'} cannot be split over ranks",
                "give whole rows of named fields, or launcher.sequence_shard to the loader",
            )
        lengths = located_row_lengths(self.rows, *row_shape(self.inputs))
        layout = replace(self.rows, row_lengths=lengths, digest=digest_of(self.inputs), shard=shard)
        cut = MicroBatch.of_fields(split_fields(self.fields(), shard), layout)
        return replace(self, inputs=cut.inputs, rows=cut.rows, targets=cut.targets)


def _named(batch: Any) -> dict[str, Any] | None:
    """Return keyword arguments by name; None for what has no names."""
    if isinstance(batch, Mapping):
        return dict(batch) if all(isinstance(name, str) for name in batch) else None
    if hasattr(batch, "to"):
        return None
    if is_dataclass(batch) and not isinstance(batch, type):
        return {one.name: getattr(batch, one.name) for one in fields(batch)}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return {name: getattr(batch, name) for name in batch._fields}
    return None
