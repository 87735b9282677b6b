"""A profiled step of any library: when the device computes, communicates, copies and waits, and for what."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

BUSY = {"kernel", "gpu_memcpy", "gpu_memset"}
LONG = 50.0
"""Microseconds from which a gap counts as one."""


def profile(steps, file=None, count=3):
    """Profile further steps of an iterator; return times per step, and write the spans of one of them to ``file``."""
    import torch
    from torch.profiler import ProfilerActivity, record_function

    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    profiler = torch.profiler.profile(activities=activities)
    next(steps)
    profiler.start()
    for _ in range(count):
        with record_function("step"):
            next(steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(exported))
        trace = Trace(json.loads(exported.read_text())["traceEvents"])
    if file is not None:
        file.write_text(json.dumps(spans_of_step(trace)))
    return device_time(trace, count)


class Trace:
    """The events of a Chrome trace, each kind apart.

    Attributes:
        device: What the device ran, by its start.
        calls: Calls of the runtime, by what links them to the device's events.
        waits: Calls in which the host waits for the device.
        host: Operations and annotations of every thread of the host, by their start.
        steps: The host's spans of profiled steps.
    """

    def __init__(self, events):
        timed = sorted((e for e in events if "dur" in e and "ts" in e), key=lambda e: e["ts"])
        runtime = [e for e in timed if e.get("cat") in {"cuda_runtime", "cuda_driver"}]
        self.device = [e for e in timed if e.get("cat") in BUSY]
        self.calls = {e["args"].get("correlation"): e for e in reversed(runtime)}
        self.waits = [e for e in runtime if "ynchronize" in e["name"]]
        self.host = {}
        for event in timed:
            if event.get("cat") in {"cpu_op", "user_annotation"}:
                self.host.setdefault(event["tid"], []).append(event)
        self.steps = [e for e in timed if e.get("cat") == "user_annotation" and e["name"] == "step"]

    def end_of(self, step):
        """When the device ended what the host launched within a step."""
        begin, last = step["ts"], step["ts"] + step["dur"]
        own = {key for key, call in self.calls.items() if begin <= call["ts"] <= last}
        return max((e["ts"] + e["dur"] for e in self.device if e["args"].get("correlation") in own), default=last)


def lane(event):
    """The lane of a device's event in a timeline."""
    if event["cat"] != "kernel":
        return "copies"
    return "communication" if event["name"].startswith("nccl") else "compute"


def spans_of_step(trace):
    """The second of the profiled steps: spans of every lane in microseconds, and its gaps with what followed them.

    A step is what lies between the ends of the device's work of two steps, since the host runs ahead: the last kernel
    launched within each ``step`` of the host ends it.
    """
    begin, end = (trace.end_of(step) for step in trace.steps[:2])
    inside = [e for e in trace.device if begin <= e["ts"] < end]
    spans = [[lane(e), round(e["ts"] - begin, 1), round(e["dur"], 1), e["name"][:60]] for e in inside]
    busy = merge((e["ts"], e["ts"] + e["dur"]) for e in inside)
    gaps = [(a[1], b[0]) for a, b in pairwise([[begin, begin], *busy]) if b[0] - a[1] > LONG]
    named = [{"at": round(a - begin, 1)} | describe_gap(trace, a, b) for a, b in gaps]
    return {"microseconds": round(end - begin, 1), "spans": spans, "gaps": named}


def device_time(trace, steps):
    """Milliseconds per step in which the device waits, and in which it only runs collectives, of a Chrome trace."""
    spans = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in trace.device]
    compute = merge((a, b) for a, b, name in spans if not name.startswith("nccl"))
    everything = merge((a, b) for a, b, _ in spans)
    gaps = [(b[0] - a[1]) / 1e3 for a, b in pairwise(everything)]
    kernels = {}
    for a, b, name in spans:
        kernels[name[:90]] = kernels.get(name[:90], 0.0) + (b - a) / 1e3 / steps
    exposed = sum(b - a for a, b in everything) - sum(b - a for a, b in compute)
    largest = sorted(pairwise(everything), key=lambda pair: pair[0][1] - pair[1][0])[:8]
    return {
        "gaps_ms": sum(gaps) / steps,
        "gaps_over_50us_ms": sum(gap for gap in gaps if gap > 0.05) / steps,
        "gaps_over_50us": sum(gap > 0.05 for gap in gaps) / steps,
        "largest_gaps": [describe_gap(trace, before[1], after[0]) for before, after in largest],
        "exposed_collectives_ms": exposed / 1e3 / steps,
        "compute_ms": sum(b - a for a, b in compute) / 1e3 / steps,
        "kernels_ms": dict(sorted(kernels.items(), key=lambda item: -item[1])[:25]),
    }


def describe_gap(trace, begin, end):
    """The kernels around a gap of the device, and what the host does in it.

    ``late_ms`` is when the kernel after the gap was launched, counted from its begin; 0.00 is a kernel that was queued
    in time and waited for another stream or rank. ``under`` are the host operations that launched it, outermost first.
    """
    ended = (e for e in trace.device if e["ts"] + e["dur"] <= begin + 1e-3)
    before = max(ended, key=lambda e: e["ts"] + e["dur"])
    after = next(e for e in trace.device if e["ts"] >= end - 1e-3)
    launch = trace.calls.get(after["args"].get("correlation"))
    waits = {e["name"] for e in trace.waits if e["ts"] < end and e["ts"] + e["dur"] > begin}
    host = trace.host.get(launch["tid"], []) if launch is not None else []
    return {
        "ms": round((end - begin) / 1e3, 2),
        "before": before["name"][:60],
        "after": after["name"][:60],
        "late_ms": 0.0 if launch is None else round(max(0.0, launch["ts"] - begin) / 1e3, 2),
        "under": [e["name"][:40] for e in host if e["ts"] <= launch["ts"] <= e["ts"] + e["dur"]],
        "host_waits": sorted(waits),
    }


def merge(spans):
    """The union of sorted intervals."""
    merged = []
    for begin, end in spans:
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged
