"""Proof, sample by sample: a mixture that is killed, and goes on on other ranks, reads what an unbroken run does.

    python benchmarks/data_resume.py
    python benchmarks/data_resume.py --phases 4:2:9,1:0:7,2:1:8 --print 3

Three sources (JSONL, Parquet, a WebDataset archive) are mixed by tokens, shuffled and packed as a stream. Each phase
``ranks:workers:steps`` starts so many processes, with so many loader workers each. After each step a rank writes what
it received, and its state. Once all have taken ``steps`` steps they are killed by SIGKILL, wherever they are; the next
phase goes on from the newest step that all of them had saved. Then every document that was received is compared, step
by step, with those of one process that was never interrupted: exit code 1, and the difference, unless all are the same.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from veomni.data import (
    BatchShape,
    DataSource,
    Encoder,
    Order,
    Packing,
    StreamLoader,
    Workers,
    build_dataloader,
    build_mixture,
    train_byte_bpe,
)

WORDS = ["the", "model", "reads", "a", "row", "of", "many", "short", "documents", "and", "learns", "what", "comes"]
ROWS = 24  # of a step
SIZES = {"talk": 2000, "code": 1200, "notes": 800}


def text(name: str, number: int) -> str:
    return f"{name} {number}: " + " ".join(WORDS[(number * 7 + k) % len(WORDS)] for k in range(3 + number * 5 % 29))


def write_sources(folder: Path) -> None:
    rows = {name: [{"text": text(name, number)} for number in range(count)] for name, count in SIZES.items()}
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows["talk"]))
    pq.write_table(pa.Table.from_pylist(rows["code"]), folder / "code.parquet", row_group_size=40)
    with tarfile.open(folder / "notes.tar", "w") as archive:
        for number, row in enumerate(rows["notes"]):
            member, content = tarfile.TarInfo(f"{number:05}.txt"), row["text"].encode()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def build(folder: Path, rank: int, size: int, workers: int) -> StreamLoader:
    paths = zip(SIZES, ("talk.jsonl", "code.parquet", "notes.tar"), (5, 3, 2), strict=True)
    sources = [DataSource(str(folder / path), name, weight) for name, path, weight in paths]
    dataset = build_mixture(sources, sampling="token")
    tokenizer = train_byte_bpe([text(name, number) for name in SIZES for number in range(40)], 400)
    loader = build_dataloader(
        dataset, Encoder(tokenizer), packing=Packing(max_seq_len=128, lookahead=12), order=Order(stream_shards=16),
        shape=BatchShape(global_batch_size=ROWS, rank=rank, size=size), workers=Workers(workers, pin_memory=False),
        cache_dir=folder,
    )  # fmt: skip
    assert isinstance(loader, StreamLoader)
    return loader


def received(step) -> list[str]:
    return [
        f"{micro.origin.source_names[source]}@{name.rpartition('/')[0].partition('/')[0]}/{name.rpartition('/')[2]}"
        for micro in step
        for name, source in zip(micro.origin.document_ids, micro.origin.document_sources, strict=True)
    ]


def rank_of_a_phase(folder: Path, out: Path, rank: int, size: int, workers: int, resume: Path | None) -> None:
    loader = build(folder, rank, size, workers)
    if resume is not None:
        loader.load_state_dict(json.loads(resume.read_text()))
    for step in loader:
        state = loader.state_dict()
        number = state["step"]
        done = {"ids": received(step), "state": state}
        temporary = out / f".{number}.{rank}"
        temporary.write_text(json.dumps(done))
        temporary.rename(out / f"{number}.{rank}.json")


def run_phase(folder: Path, index: int, phase: tuple[int, int, int], first: int, resume: Path | None):
    """Return the steps that counted, and the state to go on from."""
    size, workers, steps = phase
    out = folder / f"phase{index}"
    out.mkdir()
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=rank_of_a_phase, args=(folder, out, rank, size, workers, resume)) for rank in range(size)
    ]
    for process in ranks:
        process.start()
    wanted = [out / f"{first + steps}.{rank}.json" for rank in range(size)]
    while not all(path.exists() for path in wanted):
        if any(process.exitcode for process in ranks):
            sys.exit(f"a rank of phase {index} ended by itself")
        time.sleep(0.02)
    for process in ranks:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    last = max(n for n in range(first, first + 10_000) if all((out / f"{n}.{r}.json").exists() for r in range(size))
               or n == first)  # fmt: skip
    found = {}
    for number in range(first + 1, last + 1):
        parts = [json.loads((out / f"{number}.{rank}.json").read_text()) for rank in range(size)]
        found[number] = sorted(name for part in parts for name in part["ids"])
    state = out / "state.json"
    state.write_text(json.dumps(StreamLoader.merge_states([part["state"] for part in parts])))
    return found, state, len(list(out.glob("*.json"))) - 1 - size * (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", default="1:0:6,2:2:6,4:1:6,3:0:6,1:2:6")
    parser.add_argument("--print", type=int, default=3, dest="shown", help="documents of each step to print")
    args = parser.parse_args()
    phases = [tuple(map(int, phase.split(":"))) for phase in args.phases.split(",")]
    bad = [size for size, _, _ in phases if ROWS % size]
    if bad:
        sys.exit(f"{ROWS} rows of a step are not dealt to {bad[0]} ranks")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sources(folder)
        steps, state, first = {}, None, 0
        for index, phase in enumerate(phases):
            found, state, beyond = run_phase(folder, index, phase, first, state)
            print(f"phase {index}: {phase[0]} ranks, {phase[1]} workers each, steps {first + 1} to {max(found)}, then "
                  f"SIGKILL ({beyond} received beyond that count for nothing)")  # fmt: skip
            for number, ids in found.items():
                spread = ids[:: max(1, len(ids) // args.shown)][: args.shown]
                print(f"  step {number}: {len(ids)} documents: {', '.join(spread)}, ...")
            steps |= found
            first = max(found)
        compare(folder, steps, state)


def compare(folder: Path, steps: dict[int, list[str]], state: Path) -> None:
    unbroken = {}
    for number, step in zip(range(1, len(steps) + 1), build(folder, 0, 1, 0), strict=False):
        unbroken[number] = sorted(received(step))
    different = [number for number in unbroken if unbroken[number] != steps.get(number)]
    for number in different:
        lost, added = (
            Counter(unbroken[number]) - Counter(steps[number]),
            Counter(steps[number]) - Counter(unbroken[number]),
        )
        print(f"step {number}: lost {dict(lost)}, added {dict(added)}")
    everything = Counter(name for ids in steps.values() for name in ids)
    repeated = [name for name, count in everything.items() if count > 1]
    print(f"{everything.total()} documents in {len(steps)} steps; {len(different)} steps differ from the unbroken run; "
          f"{len(repeated)} documents repeated within an epoch; state of {state.stat().st_size} bytes")  # fmt: skip
    if different or repeated:
        sys.exit(1)


if __name__ == "__main__":
    main()
