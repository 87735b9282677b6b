from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import Counter

import pytest
import torch

from tests.data.conftest import DOCUMENTS, sentence
from tests.data.loaders import dataset_of, make_loader
from veomni.batch.fields import IGNORE_INDEX
from veomni.data import WorkerError
from veomni.errors import CheckpointError, LayoutError

ROW, STEP = 48, 8


@pytest.fixture(scope="module")
def make(corpus, tokenizer, tmp_path_factory):
    """Build a loader over the corpus; keywords override."""
    cache = tmp_path_factory.mktemp("cache")
    dataset = dataset_of(str(corpus))

    def build(rank=0, size=1, **changes):
        options = {
            "rank": rank, "size": size, "micro_batch_size": 1, "global_batch_size": STEP, "max_seq_len": ROW, "seed": 5,
            "epochs": 2, "cache_dir": cache, "on_overflow": "split",
        }  # fmt: skip
        return make_loader(dataset, tokenizer, **(options | changes))

    return build


def rows_of(step):
    """The rows of a step as (ids, labels, positions) tuples of plain numbers."""
    names = ("input_ids", "labels", "position_ids")
    return [
        tuple(tuple(micro[n][row].tolist()) for n in names) for micro in step for row in range(len(micro["labels"]))
    ]


def documents_of(step):
    """Tokens of each document, found from where positions restart; padded tails left out."""
    found = []
    for ids, labels, positions in rows_of(step):
        starts = [at for at, position in enumerate(positions) if position == 0] + [len(ids)]
        for start, stop in itertools.pairwise(starts):
            if stop - start > 1 and any(label != IGNORE_INDEX for label in labels[start:stop]):
                found.append(ids[start:stop])
    return found


def stream(loader, steps=None):
    return [rows_of(step) for _, step in zip(range(steps if steps is not None else 10**9), loader, strict=False)]


def test_every_document_appears_once_an_epoch(make, tokenizer):
    expected = Counter((*tokenizer(sentence(n))["input_ids"], tokenizer.eos_token_id) for n in range(DOCUMENTS))
    assert max(map(len, expected)) <= ROW, "the corpus was meant to fit"
    for size in (1, 2, 4):
        loaders = [list(make(rank, size)) for rank in range(size)]
        per_epoch = len(loaders[0]) // 2
        for epoch in range(2):
            steps = [step for rank in loaders for step in rank[epoch * per_epoch : (epoch + 1) * per_epoch]]
            assert Counter(document for step in steps for document in documents_of(step)) == expected


@pytest.mark.parametrize(("size", "micro"), [(1, 4), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_the_rows_of_a_step_do_not_depend_on_the_layout(make, size, micro):
    reference = [Counter(step) for step in stream(make())]
    ranks = [stream(make(rank, size, micro_batch_size=micro)) for rank in range(size)]
    assert [sum((Counter(rank[k]) for rank in ranks), Counter()) for k in range(len(ranks[0]))] == reference
    assert {len(step) for rank in ranks for step in rank} == {STEP // size}


def test_row_order_within_a_step_is_dealt_in_turn(make):
    whole, ranks = stream(make())[0], [stream(make(rank, 4))[0] for rank in range(4)]
    assert [row for position in zip(*ranks, strict=True) for row in position] == whole


def test_resumes_after_every_step_on_any_number_of_ranks(make):
    whole = [Counter(step) for step in stream(make())]
    states = [make().state_dict()]
    loader = make()
    states += [loader.state_dict() for _ in loader]
    for done, state in enumerate(states):
        for size in (1, 2, 4):
            ranks = [make(rank, size) for rank in range(size)]
            for rank in ranks:
                rank.load_state_dict(state)
            assert ranks[0].remaining_steps == len(whole) - done
            rest = [stream(rank) for rank in ranks]
            union = [sum((Counter(rank[k]) for rank in rest), Counter()) for k in range(len(rest[0]))]
            assert union == whole[done:], (done, size)


def test_state_counts_what_was_received_and_not_what_was_prefetched(make):
    alone, ahead = make(), make(count=2, prefetch_factor=4)
    for expected, step in zip(alone, ahead, strict=True):
        assert rows_of(step) == rows_of(expected)
        assert [micro.rows.document_lengths for micro in step] == [micro.rows.document_lengths for micro in expected]
        assert ahead.state_dict() == alone.state_dict()
    assert alone.state_dict()["samples"] == 2 * DOCUMENTS
    assert alone.epoch == 2


def test_iterating_again_goes_on(make):
    whole, loader = stream(make()), make()
    assert stream(loader, 3) + stream(loader) == whole
    assert stream(loader) == []


def test_epochs_differ_and_none_means_for_ever(make):
    loader = make(epochs=None)
    steps = stream(loader, 3 * len(loader))
    epochs = [steps[k * len(loader) : (k + 1) * len(loader)] for k in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader.remaining_steps is None
    assert loader.epoch == 3


def test_loading_draws_nothing_from_the_global_generators(make):
    for workers in (0, 1):
        before = torch.get_rng_state()
        stream(make(count=workers), 2)
        assert torch.equal(before, torch.get_rng_state())


def test_held_out_loader_reads_all_once_in_order_every_time(make, tokenizer):
    expected = Counter((*tokenizer(sentence(n))["input_ids"], tokenizer.eos_token_id) for n in range(DOCUMENTS))
    ranks = [make(rank, 2, held_out=True, micro_batch_size=2, strategy="none") for rank in range(2)]
    for _ in range(2):
        passes = [list(rank) for rank in ranks]
        assert Counter(d for steps in passes for step in steps for d in documents_of(step)) == expected
        shapes = [[len(micro["labels"]) for step in steps for micro in step] for steps in passes]
        assert shapes[0] == shapes[1]
        assert sum(map(sum, shapes)) == 132, "filled up to 2 ranks x 2 rows and no further"
    first = next(documents_of(step)[0] for step in ranks[0])
    assert first == (*tokenizer(sentence(0))["input_ids"], tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_seq_len": 64}, "max_seq_len"),
        ({"global_batch_size": 16}, "global_batch_size"),
        ({"seed": 6}, "seed"),
        ({"strategy": "none"}, "packing"),
        ({"shuffle": False}, "shuffle"),
        ({"on_overflow": "drop"}, "on_overflow"),
    ],
)
def test_a_state_of_another_order_is_rejected(make, changes, named):
    state = make().state_dict()
    with pytest.raises(CheckpointError, match=named):
        make(**changes).load_state_dict(state)


def test_a_state_of_other_data_is_rejected(make, corpus, tokenizer, tmp_path):
    changed = tmp_path / "train.jsonl"
    changed.write_text(corpus.read_text().replace("130: ", "9130: "))
    dataset = dataset_of(str(changed))
    options = {"max_seq_len": ROW, "global_batch_size": STEP, "seed": 5, "on_overflow": "split", "cache_dir": tmp_path}
    with pytest.raises(CheckpointError, match="documents"):
        make_loader(dataset, tokenizer, **options).load_state_dict(make().state_dict())


@pytest.mark.parametrize("change", [{"step": None}, {"step": "x"}, {"fingerprint": 3}, {"step": -1}])
def test_a_damaged_state_is_rejected(make, change):
    with pytest.raises(CheckpointError):
        make().load_state_dict(make().state_dict() | change)


def test_batch_sizes_that_do_not_divide_are_rejected(make):
    with pytest.raises(LayoutError, match=r"global_batch_size 8 .* 3 data ranks"):
        make(0, 3)


def worker_processes():
    return [child for child in multiprocessing.active_children() if child.is_alive()]


def kill_and_read_on(pid, loop):
    os.kill(pid, signal.SIGKILL)
    for _ in loop:
        pass


def test_a_killed_worker_is_reported(make):
    loop = iter(make(count=2, epochs=None))
    next(loop)
    victim = worker_processes()[0].pid
    with pytest.raises((WorkerError, RuntimeError), match=str(victim)):
        kill_and_read_on(victim, loop)


def test_a_hanging_worker_is_reported_and_ended(make):
    loop = iter(make(count=1, epochs=None, timeout=1.0))
    next(loop)
    victim = worker_processes()[0]
    os.kill(victim.pid, signal.SIGSTOP)
    with pytest.raises((WorkerError, RuntimeError), match=str(victim.pid)):
        for _ in loop:
            pass
    victim.join(10)
    assert not victim.is_alive()


def test_workers_outlive_the_signals_that_stop_the_training_process(make):
    loop = iter(make(count=1, epochs=None))
    next(loop)
    workers = worker_processes()
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    for _ in range(20):
        next(loop)
    assert worker_processes() == workers != []
