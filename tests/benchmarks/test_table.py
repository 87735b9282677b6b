"""A row runs on two gloo ranks, a page shows what was measured, and a timeline names the gaps that it has."""

from __future__ import annotations

import json
from functools import partial

import pytest

from benchmarks.arithmetic import flops_per_token, lengths_of
from benchmarks.clock import measure
from benchmarks.draw import gap_table
from benchmarks.rows import ROWS
from benchmarks.scale import combine
from benchmarks.stacks import accelerate, fabric, ours, torchtitan, upstream
from benchmarks.table import put, read, table_of, weak_scaling
from benchmarks.timeline import Trace, device_time, spans_of_step
from veomni.testing.ranks import run_ranks


def result(stack, speed, gpus=2, row="dense"):
    shape = {name: getattr(ROWS[row], name) for name in ROWS[row].__dataclass_fields__}
    return shape | {"row": row, "stack": stack, "gpus": gpus, "tokens_per_second": speed, "peak_gib": 1.0,
                    "worst_over_median": 1.25, "matmul_tflops": 1e-9, "flops_per_token": 4.0}  # fmt: skip


def event(category, name, begin, long, correlation=0, thread=1):
    return {
        "cat": category,
        "name": name,
        "ts": begin,
        "dur": long,
        "tid": thread,
        "args": {"correlation": correlation},
    }


EVENTS = [
    event("user_annotation", "step", 0.0, 100.0),
    event("cuda_runtime", "cudaLaunchKernel", 10.0, 2.0, 1),
    event("kernel", "matmul", 20.0, 30.0, 1, 7),
    event("user_annotation", "step", 100.0, 400.0),
    event("cuda_runtime", "cudaLaunchKernel", 110.0, 2.0, 2),
    event("kernel", "matmul", 115.0, 85.0, 2, 7),
    event("kernel", "ncclDevKernel_AllGather", 150.0, 100.0, 2, 8),
    event("cpu_op", "aten::copy_", 440.0, 30.0),
    event("cuda_runtime", "cudaMemcpyAsync", 450.0, 2.0, 3),
    event("gpu_memcpy", "Memcpy HtoD", 460.0, 40.0, 3, 9),
]
"""Two steps: 50 to 500 us is the second, with a gap of 65 us before its first kernel and one of 210 before its copy."""


def test_a_timeline_has_the_lanes_and_names_the_gaps(tmp_path):
    step = spans_of_step(Trace(EVENTS))
    assert step["microseconds"] == 450.0
    assert [(lane, begin, long) for lane, begin, long, _ in step["spans"]] == [
        ("compute", 65.0, 85.0), ("communication", 100.0, 100.0), ("copies", 410.0, 40.0)
    ]  # fmt: skip
    assert [(gap["at"], gap["ms"]) for gap in step["gaps"]] == [(0.0, 0.07), (200.0, 0.21)]
    assert step["gaps"][1]["under"] == ["step", "aten::copy_"]
    times = device_time(Trace(EVENTS), 2)
    assert times["exposed_collectives_ms"] == pytest.approx(0.025)
    assert times["gaps_ms"] == pytest.approx((0.065 + 0.21) / 2)
    (tmp_path / "dense.ours.json").write_text(json.dumps(step))
    assert "| 1 | 0.21 | step > aten::copy_ | `Memcpy HtoD` |" in gap_table(tmp_path / "dense.ours.json")


def test_a_page_shows_the_last_results_beside_each_other(tmp_path):
    file, page = tmp_path / "out.jsonl", tmp_path / "page.md"
    failed = result("accelerate", 0.0) | {"failed": "out of memory"}
    measured = [
        result("ours", 50.0),
        result("ours", 100.0),
        result("torchtitan", 80.0),
        failed,
        result("ours", 90.0, 4),
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in measured))
    lines = table_of(read([file]))
    assert "| VeOmni | 100 | 0.400 |  | 1.0 GiB | 1.25 times |" in lines[2]
    assert "| torchtitan | 80 | 0.320 | 1.25 times as fast |" in lines[3]
    assert "not measured: out of memory" in lines[4]
    assert "| dense | VeOmni | 2 to 4 | 0.900 |" in weak_scaling(read([file]))
    page.write_text("before\n<!-- scale -->\nold\n<!-- /scale -->\nafter\n")
    put(page, lines)
    assert page.read_text() == "\n".join(["before", "<!-- scale -->", *lines, "<!-- /scale -->", "after", ""])


def test_a_packed_row_counts_its_documents_apart():
    apart, together = (flops_per_token(ROWS[name]) for name in ("tiny_ring", "tiny_ulysses"))
    assert sum(lengths_of(ROWS["tiny_ring"])) == ROWS["tiny_ring"].length
    assert 0 < apart < together


def test_peers_say_which_rows_they_lack():
    assert {name for name in ROWS if torchtitan.lacks(ROWS[name])} >= {"dense_chats", "dense_muon", "ring_packed"}
    assert not any(peer.lacks(ROWS["dense"]) for peer in (torchtitan, upstream, accelerate))
    assert accelerate.lacks(ROWS["moe8_ep"]) == "no expert parallelism"
    peers = torchtitan, upstream, accelerate, fabric
    for name in (
        "dense_chats",
        "vlm_images",
        "dense_muon",
        "dense_reduce_bf16",
        "dense_float8",
        "long_1gpu_131k_offload",
    ):
        assert all(peer.lacks(ROWS[name]) for peer in peers), name


def test_a_row_is_measured_on_two_ranks():
    ranks = run_ranks(partial(measured, ROWS["tiny_eager"]), 2)
    assert all(rank["tokens_per_second"] > 0 for rank in ranks)
    both = combine(ranks) | result("ours", 0.0) | {"tokens_per_second": combine(ranks)["tokens_per_second"]}
    assert both["median_ms"] == max(rank["median_ms"] for rank in ranks)
    assert f"{both['tokens_per_second']:,.0f}" in table_of([both])[2]


def measured(row):
    return measure(ours.training(row, 2), warmup=1, count=2)
