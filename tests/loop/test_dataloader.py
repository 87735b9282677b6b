"""Any torch DataLoader as steps: every sample once, the same steps on any number of ranks, and an exact resume."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from veomni.errors import CheckpointError, DataError, InputError
from veomni.loop.dataloader import step_loader, warn_unsaved_loader
from veomni.loop.step_reader import StepReader


class Numbers(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"x": torch.tensor([float(index)])}


class Stream(IterableDataset):
    """Split by worker, as torch asks of an iterable dataset that has several."""

    def __init__(self, length):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return ({"x": torch.tensor([float(1000 * self.epoch + index)])} for index in range(first, self.length, stride))


class PythonRandom(Sampler):
    """Draws from Python's generator, which ranks seed differently."""

    def __init__(self, dataset):
        self.length = len(dataset)

    def __iter__(self):
        return iter(random.sample(range(self.length), self.length))

    def __len__(self):
        return self.length


def values(micro):
    return [] if micro.samples == 0 else [int(value) for value in micro.inputs["x"].flatten()]


def ranks(make, size, **options):
    return [step_loader(make(), (rank, size), seed=3, **options) for rank in range(size)]


def epoch(loaders, steps=None):
    """Take steps of all ranks in turn; return the sorted samples of each."""
    found = []
    for step in zip(*loaders, strict=True) if steps is None else zip(range(steps), *loaders, strict=False):
        micro_batches = step if steps is None else step[1:]
        assert len({len(micro) for micro in micro_batches}) == 1, "as many micro-batches on every rank"
        found.append(sorted(value for rank in micro_batches for micro in rank for value in values(micro)))
    return found


SAMPLERS = {
    "sequential": lambda data: {"shuffle": False},
    "shuffled": lambda data: {"shuffle": True},
    "generator": lambda data: {"shuffle": True, "generator": torch.Generator().manual_seed(random.getrandbits(30))},
    "python": lambda data: {"sampler": PythonRandom(data)},
    "subset": lambda data: {"sampler": SubsetRandomSampler(range(0, len(data), 2))},
    "distributed": lambda data: {"sampler": DistributedSampler(data, num_replicas=2, rank=1)},
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("length", [24, 23, 17])
def test_every_sample_comes_once_and_steps_are_the_same_on_any_ranks(sampler, length):
    def make():
        data = Numbers(length)
        return DataLoader(data, batch_size=2, **SAMPLERS[sampler](data))

    layouts = [(1, 4), (2, 2), (4, 1)]
    first, *others = [epoch(ranks(make, size, accumulate=accumulate)) for size, accumulate in layouts]
    expected = range(0, length, 2) if sampler == "subset" else range(length)
    assert sorted(value for step in first for value in step) == list(expected)
    assert len(first) == -(-len(expected) // 8)
    assert all(other == first for other in others)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("before", "after"), [((2, 1), (2, 1)), ((2, 1), (1, 2)), ((1, 2), (2, 1)), ((2, 1), (3, 1))])
def test_it_resumes_in_the_middle_of_the_second_epoch(workers, before, after):
    def make():
        return DataLoader(Numbers(23), batch_size=2, shuffle=True, num_workers=workers)

    loaders = ranks(make, before[0], accumulate=before[1])
    first = epoch(loaders)
    taken = epoch(loaders, steps=2)
    assert first[:2] != taken, "another epoch, another order"
    (state,) = {str(loader.state_dict()): loader.state_dict() for loader in loaders}.values()
    resumed = ranks(make, after[0], accumulate=after[1])
    for loader in resumed:
        loader.load_state_dict(state)
        assert loader.epoch == 1
    rest = epoch(resumed)
    assert sorted(value for step in taken + rest for value in step) == list(range(23))
    if before[0] * before[1] == after[0] * after[1]:
        assert rest == epoch(loaders) or rest == epoch(_at(make, before, state))


def _at(make, layout, state):
    loaders = ranks(make, layout[0], accumulate=layout[1])
    for loader in loaders:
        loader.load_state_dict(state)
    return loaders


def test_epochs_of_one_iteration_and_set_epoch():
    def make():
        return DataLoader(Numbers(8), batch_size=2, shuffle=True)

    (loader,) = ranks(make, 1, epochs=2)
    assert loader.remaining_steps == 8
    both = epoch([loader])
    (again,) = ranks(make, 1)
    again.set_epoch(1)
    assert epoch([again]) == both[4:]
    assert again.epoch == loader.epoch == 2
    assert again.remaining_steps == 4


def test_drop_last_leaves_out_what_fills_no_step():
    loaders = ranks(lambda: DataLoader(Numbers(23), batch_size=2, drop_last=True), 2, accumulate=2)
    assert [len(step) for step in epoch(loaders)] == [8, 8]
    with pytest.raises(DataError, match="a step takes 8"):
        step_loader(DataLoader(Numbers(7), batch_size=2, drop_last=True), (0, 2), seed=0, accumulate=2)


def test_a_rank_without_a_sample_gets_a_filler():
    loaders = ranks(lambda: DataLoader(Numbers(9), batch_size=2), 2, accumulate=2)
    *_, last = zip(*loaders, strict=True)
    assert [[micro.samples for micro in rank] for rank in last] == [[1], [0]]


def test_ready_batches_are_dealt_whole():
    def by_length():
        return DataLoader(Numbers(20), batch_sampler=_Odd(SequentialSampler(range(20)), 3, drop_last=False))

    for size, accumulate in ((1, 2), (2, 1)):
        steps = epoch(ranks(by_length, size, accumulate=accumulate))
        assert [len(step) for step in steps] == [6, 6, 6, 2]

    items = epoch(ranks(lambda: DataLoader(Numbers(5), batch_size=None), 2))
    assert [len(step) for step in items] == [2, 2, 1]


class _Odd(BatchSampler):
    """A batch sampler of the user's own."""


def test_draws_with_replacement_are_the_same_on_all_ranks():
    def make():
        data = Numbers(30)
        weights = [float(index % 3 == 0) for index in range(30)]
        return DataLoader(data, batch_size=2, sampler=WeightedRandomSampler(weights, 16))

    one, two = (epoch(ranks(make, size, accumulate=2 // size)) for size in (1, 2))
    assert one == two
    assert all(value % 3 == 0 for step in one for value in step)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("length", "batch_size"), [(24, 2), (21, 2), (9, None)])
def test_a_stream_gives_every_item_once_and_resumes(workers, length, batch_size):
    def make():
        return DataLoader(Stream(length), batch_size=batch_size, num_workers=workers)

    loaders = ranks(make, 2, accumulate=2)
    taken, state = [], None
    for number, step in enumerate(zip(*loaders, strict=False)):
        if all(loader.exhausted for loader in loaders):
            break
        taken.append(sorted(value for rank in step for micro in rank for value in values(micro)))
        state = loaders[0].state_dict() if number == 0 else state
    assert sorted(value for step in taken for value in step) == list(range(length))

    resumed = _at(make, (2, 2), state)
    assert epoch(resumed, steps=len(taken) - 1) == taken[1:]
    (alone,) = _at(make, (1, 2), state)
    rest = [value for step in alone for micro in step for value in values(micro)]
    assert sorted(rest + taken[0]) == list(range(length))
    assert alone.epoch == 1
    assert values(next(iter(alone))[0])[0] == 1000, "the next epoch of the stream"


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Graph:
    nodes: torch.Tensor
    sizes: list


def stacked(rows):
    return torch.stack([row["x"] for row in rows])


BATCHES = {
    "tuple": (lambda rows: (stacked(rows), torch.ones(len(rows))), lambda micro: micro.args[0]),
    "tensor": (stacked, lambda micro: micro.args[0]),
    "named": (lambda rows: Pair(stacked(rows), torch.ones(1)), lambda micro: micro.inputs["x"]),
    "dataclass": (lambda rows: Graph(stacked(rows), [1] * len(rows)), lambda micro: micro.inputs["nodes"]),
    "lists": (lambda rows: {"graphs": [{"nodes": row} for row in rows]}, lambda micro: stacked_nodes(micro)),
    "nested": (lambda rows: {"x": torch.nested.as_nested_tensor([row["x"] for row in rows], layout=torch.jagged)},
               lambda micro: micro.inputs["x"].values()),
}  # fmt: skip


def stacked_nodes(micro):
    return stacked([graph["nodes"] for graph in micro.inputs["graphs"]])


@pytest.mark.parametrize("form", BATCHES)
def test_whatever_is_collated_becomes_micro_batches(form):
    collate, read = BATCHES[form]
    (loader,) = ranks(lambda: DataLoader(Numbers(6), batch_size=4, collate_fn=collate), 1)
    micro_batches = [micro for step in loader for micro in step]
    assert [micro.samples for micro in micro_batches] == [4, 2]
    assert [int(value) for micro in micro_batches for value in read(micro).flatten()] == list(range(6))


def test_bad_loaders_and_states_are_named():
    loader = DataLoader(Numbers(8), batch_size=2, shuffle=True)
    with pytest.raises(InputError, match="setup_dataloader"):
        StepReader(loader, None, None)
    with pytest.raises(InputError, match="given a Numbers"):
        step_loader(Numbers(8), (0, 1), seed=0)
    with pytest.raises(InputError, match="accumulate is 0"):
        step_loader(loader, (0, 1), seed=0, accumulate=0)
    with pytest.raises(InputError, match="iterable dataset"):
        step_loader(DataLoader(Stream(8)), (0, 1), seed=0, epochs=2)
    state = step_loader(loader, (0, 1), seed=0).state_dict()
    for other in (step_loader(loader, (0, 1), seed=1), step_loader(DataLoader(Numbers(9)), (0, 1), seed=0)):
        with pytest.raises(CheckpointError, match=r"the data differ .* then"):
            other.load_state_dict(state)


def test_a_resume_without_the_state_of_a_loader_is_said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("veomni"), "propagate", True)
    loader = step_loader(DataLoader(Numbers(8), batch_size=2), (0, 1), seed=0)
    model = torch.nn.Linear(1, 1)
    for state, step, said in (
        ({"model": model}, 3, True),
        ({"model": model}, 0, False),
        ({"loader": loader}, 3, False),
    ):
        caplog.clear()
        warn_unsaved_loader(state, step)
        assert bool(caplog.records) == said
