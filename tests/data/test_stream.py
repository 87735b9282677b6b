"""Streams: every record once an epoch, in rows that no layout, no worker and no interruption changes."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections import Counter

import pytest

from tests.data.conftest import DOCUMENTS, sentence
from tests.data.loaders import dataset_of, make_loader
from tests.data.stream_files import KINDS, jsonl, records, write_jsonl, write_parquet, write_tar
from veomni.data import DataSource, StreamLoader, build_mixture
from veomni.errors import CheckpointError, DataError
from veomni.testing.ranks import RankFailed, run_ranks

ROW, STEP, SHARDS = 48, 8, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources of three kinds."""
    folder = tmp_path_factory.mktemp("streams")
    write_jsonl(folder, records(90, "one "))
    write_parquet(folder, records(60, "two "))
    write_tar(folder, records(40, "three "))
    return folder


@pytest.fixture(scope="module")
def make(folder, tokenizer):
    """Build a loader over a mixture; keywords of its dataset are named, the others are the loader's."""

    def build(rank=0, size=1, streaming=True, stopping="repeat", sampling="token", weights=(3, 2, 1), **changes):
        paths = ("data.jsonl", "data.parquet", "data.tar")
        sources = [
            DataSource(str(folder / path), path[5:], weight) for path, weight in zip(paths, weights, strict=True)
        ]
        dataset = build_mixture(
            sources,
            streaming=streaming,
            stopping_strategy=stopping,
            sampling=sampling,
            cache_dir=folder / "cache",
        )
        options = {
            "rank": rank, "size": size, "global_batch_size": STEP, "max_seq_len": ROW, "seed": 5,
            "on_overflow": "split", "cache_dir": folder / "cache", "stream_shards": SHARDS, "lookahead": 6,
            "pin_memory": False,
        }  # fmt: skip
        return make_loader(dataset, tokenizer, **(options | changes))

    return build


def ids_of(step):
    """The documents of a step, row after row: where each comes from, and its tokens."""
    found = []
    for micro in step:
        ends = itertools.accumulate(micro.rows.document_lengths)
        filled = zip(micro["input_ids"], micro.rows.row_lengths, strict=True)
        flat = [tuple(row[:length].tolist()) for row, length in filled]
        joined = tuple(token for row in flat for token in row)
        starts = [0, *ends]
        places = zip(micro.origin.document_ids, itertools.pairwise(starts), strict=True)
        sources = [micro.origin.source_names[source] for source in micro.origin.document_sources]
        found += [(name, source, joined[start:stop])
                  for (name, (start, stop)), source in zip(places, sources, strict=True)]  # fmt: skip
    return found


def dealt(ranks, count):
    """The global batches that several ranks make together, as counters of documents."""
    loops = [iter(rank) for rank in ranks]
    return [Counter(document for loop in loops for document in ids_of(next(loop))) for _ in range(count)]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_record_of_every_kind_comes_once_an_epoch(kind, streaming, tokenizer, tmp_path):
    rows = records(DOCUMENTS)
    path = KINDS[kind](tmp_path, rows)
    dataset = dataset_of(str(path), streaming=True) if streaming else \
        build_mixture([DataSource(str(path))], streaming=False, cache_dir=tmp_path / "cache")  # fmt: skip
    expected = Counter((*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id) for row in rows)
    loader = make_loader(
        dataset, tokenizer, global_batch_size=4, max_seq_len=96, epochs=2, stream_shards=6, lookahead=9,
        pin_memory=False, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    found = [document for step in itertools.islice(loader, 500) for document in ids_of(step)]
    for epoch in range(2):
        mine = [(name, tokens) for name, _, tokens in found if name.startswith(f"{epoch}/")]
        assert Counter(tokens for _, tokens in mine) == expected
        assert len({name for name, _ in mine}) == DOCUMENTS, "each has a name of its own"
    first, second = ([name[2:] for name, _, _ in found if name.startswith(f"{epoch}/")] for epoch in range(2))
    assert first != second, "epochs are shuffled anew"
    assert first != sorted(first)


@pytest.mark.parametrize("streaming", [True, False])
def test_every_epoch_has_an_order_of_its_own(streaming, tokenizer, tmp_path):
    """Of one shard whose rows are single documents: the order is that of the reading."""
    path = write_parquet(tmp_path, records(60)) if streaming else write_jsonl(tmp_path, records(60))
    dataset = build_mixture([DataSource(str(path), "all")], streaming=streaming)

    def orders(**changes):
        options = {"max_seq_len": 64, "stream_shards": 1, "strategy": "none", "epochs": 3, "pin_memory": False,
                   "cache_dir": tmp_path} | changes  # fmt: skip
        names = [name for step in make_loader(dataset, tokenizer, **options)
                 for micro in step for name in micro.origin.document_ids]  # fmt: skip
        return [[name[2:] for name in names if name.startswith(f"{epoch}/")] for epoch in range(3)]

    shuffled, other, plain = orders(), orders(seed=1), orders(shuffle=False)
    assert plain[0] == plain[1] == plain[2]
    different = [*shuffled, *other, plain[0]]
    assert all(left != right for left, right in itertools.combinations(different, 2))
    number = {name: index for index, name in enumerate(plain[0])}
    if streaming:  # row groups of 7 records: neither they nor what is in them stay in order
        blocks = [[number[name] // 7 for name in order] for order in shuffled]
        assert len({tuple(dict.fromkeys(order)) for order in blocks}) == 3
        assert any(number[left] > number[right] for left, right in itertools.pairwise(shuffled[0])
                   if number[left] // 7 == number[right] // 7)  # fmt: skip


@pytest.mark.parametrize(("size", "micro"), [(1, 4), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_the_rows_of_a_step_do_not_depend_on_the_layout(make, size, micro):
    whole = dealt([make()], 12)
    assert dealt([make(rank, size, micro_batch_size=micro) for rank in range(size)], 12) == whole


def test_ranks_that_do_not_divide_the_shards_read_the_same_rows(make):
    options = {"global_batch_size": 12}
    assert dealt([make(rank, 3, **options) for rank in range(3)], 9) == dealt([make(**options)], 9)


def test_workers_change_nothing_and_their_state_is_that_of_what_was_received(make):
    alone, ahead = make(), make(count=2, prefetch_factor=3)
    for (left, right), _ in zip(zip(alone, ahead, strict=True), range(7), strict=False):
        assert [micro["labels"].tolist() for micro in left] == [micro["labels"].tolist() for micro in right]
        assert ids_of(left) == ids_of(right)
        assert ahead.state_dict() == alone.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [True, False])
def test_interrupted_and_resized_runs_read_what_an_unbroken_one_does(make, workers, streaming):
    """1, 2, 4, 3, 8 and 1 ranks in turn, each through JSON: sample by sample."""
    options = {"count": workers, "streaming": streaming, "global_batch_size": 24}
    whole = dealt([make(**options)], 18)
    found, state = [], None
    for size in (1, 2, 4, 3, 8, 1):
        ranks = [make(rank, size, **options) for rank in range(size)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(json.loads(state))
        found += dealt(ranks, 3)
        state = json.dumps(StreamLoader.merge_states([rank.state_dict() for rank in ranks]))
    assert found == whole
    names = [name for step in found for name, source, _ in step.elements()]
    pieces = [(source, name) for step in found for name, source, _ in step.elements()]
    assert len(names) > 150
    assert len(set(pieces)) == len(pieces), "nothing is repeated"
    assert "one " not in state, "indices, never samples"


def test_a_state_taken_after_any_step_resumes(make):
    whole, loader = dealt([make()], 9), make()
    for done, _ in zip(range(1, 8), loader, strict=False):
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = [make(rank, 2) for rank in range(2)]
        for rank in resumed:
            rank.load_state_dict(state)
        assert dealt(resumed, 2) == whole[done : done + 2]


def test_iterating_again_goes_on(make):
    whole, loader = dealt([make()], 6), make()
    assert [step for _ in range(3) for step in dealt([loader], 2)] == whole


def read_and_die(make, path, die_at):
    """Read as a rank, writing down what was received; a rank is killed in the middle of it."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    loader = make(rank, size, count=1)
    saved = path / "state.json"
    if saved.exists():
        loader.load_state_dict(json.loads(saved.read_text()))
    import torch.distributed as dist

    for number, step in enumerate(loader, start=loader.state_dict()["step"]):
        with (path / f"{number}.{size}.{rank}.json").open("w") as file:
            json.dump(ids_of(step), file)
        states = [None] * size
        dist.all_gather_object(states, loader.state_dict())
        if rank == 0 and number % 3 == 2:
            (path / "new").write_text(json.dumps(StreamLoader.merge_states(states)))
            (path / "new").replace(saved)
        dist.barrier()
        if number == die_at and rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 12:
            return


def test_a_killed_run_goes_on_from_its_last_state_on_other_ranks(make, tmp_path):
    with pytest.raises(RankFailed):
        run_ranks(read_and_die, 2, make, tmp_path, 4)  # saved after 2, killed in 4
    with pytest.raises(RankFailed):
        run_ranks(read_and_die, 4, make, tmp_path, 7)  # saved after 5, killed in 7
    run_ranks(read_and_die, 1, make, tmp_path, None)
    whole = dealt([make()], 13)
    for number, step in enumerate(whole):
        size = 2 if number < 3 else 4 if number < 6 else 1
        parts = [json.loads((tmp_path / f"{number}.{size}.{rank}.json").read_text()) for rank in range(size)]
        found = Counter((name, source, tuple(tokens)) for part in parts for name, source, tokens in part)
        assert found == step, number


# -------------------------------------------------------------------- mixing


@pytest.mark.parametrize("sampling", ["sample", "token"])
def test_shares_are_the_weights(make, sampling):
    loader, samples, tokens = make(sampling=sampling, weights=(0.5, 0.3, 0.2)), Counter(), Counter()
    for step, _ in zip(loader, range(80), strict=False):
        for name, source, ids in ids_of(step):
            samples[source] += ", piece" not in name
            tokens[source] += len(ids)
    counted = samples if sampling == "sample" else tokens
    for source, share in zip(("jsonl", "parquet", "tar"), (0.5, 0.3, 0.2), strict=True):
        assert counted[source] / counted.total() == pytest.approx(share, abs=0.03)
    for source, counts in loader.source_counts().items():
        assert counts["samples"] >= samples[source], "those that wait for a row are counted"


def test_a_source_of_weight_zero_is_not_read(make):
    step, *_ = itertools.islice(dealt([make(weights=(1, 0, 0))], 3), 3)
    assert {source for _, source, _ in step} == {"jsonl"}


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
def test_a_mixture_ends_as_it_is_told(make, stopping, folder):
    everything = {"jsonl": 90, "parquet": 60, "tar": 40}
    loader = make(stopping=stopping, sampling="sample", weights=(1, 1, 1), max_seq_len=64)
    read, again = {name: set() for name in everything}, set()
    for step in loader:
        for name, source, _ in ids_of(step):
            (read[source] if name.startswith("0/") else again).add(name)
    if stopping == "all_exhausted":
        assert {name: len(found) for name, found in read.items()} == everything
        assert again, "shorter sources were read again"
    else:
        assert not again
        assert len(read["tar"]) >= 40 - SHARDS, "every shard ends when its part of one source does"
        assert len(read["jsonl"]) < 90
    assert loader.exhausted


@pytest.mark.parametrize("size", [1, 2])
def test_a_finite_stream_ends_evenly_and_loses_nothing(make, size):
    """Ranks whose shards end early go on with empty steps, as many as the others need."""
    options = {"stopping": "all_exhausted", "weights": (1, 0, 0), "epochs": 2}
    ranks = [make(rank, size, **options) for rank in range(size)]
    loops, found = [iter(rank) for rank in ranks], Counter()
    while True:
        steps = [next(loop, None) for loop in loops]
        if steps[0] is None or all(
            rank.exhausted and not ids_of(step) for rank, step in zip(ranks, steps, strict=True)
        ):
            break
        assert len({len(step) for step in steps}) == 1
        found.update(document for step in steps for document in ids_of(step))
    assert len(found) == 180
    assert set(found.values()) == {1}


# -------------------------------------------------------------------- what changed


def test_a_source_that_shrinks_or_changes_is_named(tokenizer, tmp_path):
    def build():
        sources = [DataSource(str(tmp_path / f"{name}.jsonl"), name) for name in ("steady", "moving")]
        dataset = build_mixture(sources, streaming=True)
        return make_loader(dataset, tokenizer, max_seq_len=64, stream_shards=2, pin_memory=False,
                                cache_dir=tmp_path / "cache")  # fmt: skip

    jsonl(tmp_path / "steady.jsonl", records(30))
    jsonl(tmp_path / "moving.jsonl", records(30))
    loader = build()
    next(iter(loader))
    state = loader.state_dict()
    other = [*records(29), {"text": sentence(29).replace("the", "THE")}]
    for content, verb in ((records(20), "has shrunk"), (other, "has changed")):
        jsonl(tmp_path / "moving.jsonl", content)
        with pytest.raises(CheckpointError, match=f"source 'moving' {verb}") as raised:
            build().load_state_dict(state)
        assert "steady" not in raised.value.problem
    jsonl(tmp_path / "moving.jsonl", records(30))
    build().load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_seq_len": 64}, "max_seq_len"), ({"seed": 6}, "seed"), ({"strategy": "none"}, "packing"),
        ({"shuffle": False}, "shuffle"), ({"stream_shards": 4}, "stream_shards"), ({"lookahead": 7}, "lookahead"),
        ({"weights": (1, 1, 1)}, "weights"), ({"sampling": "sample"}, "sampling"),
        ({"on_overflow": "drop"}, "on_overflow"),
        ({"stopping": "all_exhausted"}, "stopping"), ({"max_media_tokens": 5}, "max_media_tokens"),
    ],
)  # fmt: skip
def test_a_state_of_another_order_is_rejected(make, changes, named):
    loader = make()
    next(iter(loader))
    with pytest.raises(CheckpointError, match=named):
        make(**changes).load_state_dict(loader.state_dict())


def test_a_state_of_one_rank_alone_is_rejected_on_others(make):
    ranks = [make(rank, 2) for rank in range(2)]
    dealt(ranks, 2)
    with pytest.raises(CheckpointError, match="lacks virtual shard 1 of 8"):
        make().load_state_dict(ranks[0].state_dict())


@pytest.mark.parametrize(
    "change", [{"step": None}, {"fingerprint": 3}, {"shards": {"0": {"rows": 1}}}, {"shards": {"a": {}}}, {"shards": 5}]
)
def test_a_damaged_state_is_rejected(make, change):
    loader = make()
    next(iter(loader))
    with pytest.raises(CheckpointError):
        make().load_state_dict(loader.state_dict() | change)


def test_too_few_records_for_the_shards_are_named(tokenizer, tmp_path):
    path = jsonl(tmp_path / "few.jsonl", records(3))
    options = {
        "max_seq_len": 64,
        "stream_shards": 8,
        "global_batch_size": 8,
        "pin_memory": False,
        "cache_dir": tmp_path,
    }
    dataset = build_mixture([DataSource(str(path), "few")], streaming=False)
    with pytest.raises(DataError, match=r"source 'few': 3 records for 8 virtual shards"):
        make_loader(dataset, tokenizer, **options)
    dataset = build_mixture([DataSource(str(path), "few")], streaming=True)
    endless = make_loader(dataset, tokenizer, **options | {"shuffle": False})
    with pytest.raises(DataError, match=r"source 'few': no record of virtual shard \d of 8 can be used"):
        list(itertools.islice(endless, 9))
    steps = list(make_loader(dataset, tokenizer, epochs=1, **options))
    assert sum(len(micro.origin.document_ids) for step in steps for micro in step) == 3, "a finite stream needs no more"
    assert len(list(itertools.islice(make_loader(dataset, tokenizer, **options), 3))) == 3, "nor one that is shuffled"


@pytest.mark.parametrize("count", [0, 1])
def test_a_record_that_cannot_be_used_is_named_by_workers_too(count, tokenizer, tmp_path):
    dataset = dataset_of(str(jsonl(tmp_path / "long.jsonl", [{"text": sentence(1) * 9}])), streaming=True)
    options = {"count": count, "max_seq_len": 16, "stream_shards": 1, "pin_memory": False, "cache_dir": tmp_path}
    with pytest.raises(DataError, match=r"long.jsonl, byte 0: \d+ tokens, more than max_seq_len 16"):
        next(iter(make_loader(dataset, tokenizer, **options)))


def test_held_out_conversations_come_once_in_order_each_time(tokenizer, tmp_path):
    """Preference pairs are made while they are read, held-out ones too."""
    rows = [{"prompt": sentence(n), "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(11)]
    dataset = dataset_of(str(jsonl(tmp_path / "pairs.jsonl", rows)), data_type="preference")
    for size in (1, 2):
        ranks = [
            make_loader(dataset, tokenizer, rank=rank, size=size, held_out=True, global_batch_size=4,
                             max_seq_len=128, strategy="none", pin_memory=False, cache_dir=tmp_path)
            for rank in range(size)
        ]  # fmt: skip
        for _ in range(2):
            passes = [list(rank) for rank in ranks]
            assert len({len(steps) for steps in passes}) == 1
            rows = [document for step in zip(*passes, strict=True) for micro in zip(*step, strict=True)
                    for document in ids_of(micro)]  # fmt: skip
            sides = [name for name, _, _ in rows]
            assert sides[::2] == [f"0/{tmp_path}/pairs.jsonl, line {n + 1}, chosen" for n in range(11)]
            assert sides[1::2] == [f"0/{tmp_path}/pairs.jsonl, line {n + 1}, rejected" for n in range(11)]
