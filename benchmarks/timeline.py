"""A profiled step of any library: where the device computes, communicates, copies and waits, and what for."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

BUSY = {"kernel", "gpu_memcpy", "gpu_memset"}
LONG = 50.0
"""Microseconds from which a gap counts as one."""


def profile(steps, file=None, count=3):
    """Profile further steps of an iterator; return times per step, and leave the spans of one of them in ``file``."""
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
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    if file is not None:
        file.write_text(json.dumps(spans_of_step(events)))
    return device_time(events, count)


def lane(event):
    """The lane of a device's event in a timeline."""
    if event["cat"] != "kernel":
        return "copies"
    return "communication" if event["name"].startswith("nccl") else "compute"


def device_events(events):
    """What the device ran, by its start."""
    found = [e for e in events if e.get("cat") in BUSY]
    return sorted(found, key=lambda e: e["ts"])


def spans_of_step(events):
    """The second of the profiled steps: spans of every lane in microseconds, and its gaps with what followed them.

    A step is what lies between the ends of the device's work of two steps, since the host runs ahead: the last kernel
    launched within each ``step`` of the host ends it.
    """
    device = device_events(events)
    bounds = [end_of(step, events, device) for step in host_steps(events)]
    begin, end = bounds[0], bounds[1]
    inside = [e for e in device if begin <= e["ts"] < end]
    spans = [[lane(e), round(e["ts"] - begin, 1), round(e["dur"], 1), e["name"][:60]] for e in inside]
    busy = merge((e["ts"], e["ts"] + e["dur"]) for e in inside)
    gaps = [(a[1], b[0]) for a, b in pairwise([[begin, begin], *busy]) if b[0] - a[1] > LONG]
    named = [{"at": round(a - begin, 1)} | describe_gap(events, a, b) for a, b in gaps]
    return {"microseconds": round(end - begin, 1), "spans": spans, "gaps": named}


def host_steps(events):
    """The host's spans of profiled steps."""
    steps = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == "step"]
    return sorted(steps, key=lambda e: e["ts"])


def end_of(step, events, device):
    """When the device ended what the host launched within a step."""
    last = step["ts"] + step["dur"]
    calls = {
        e["args"].get("correlation")
        for e in events
        if e.get("cat") in {"cuda_runtime", "cuda_driver"} and step["ts"] <= e["ts"] <= last
    }
    return max((e["ts"] + e["dur"] for e in device if e["args"].get("correlation") in calls), default=last)


def device_time(events, steps):
    """Milliseconds per step in which the device waits, and in which it only runs collectives, of a Chrome trace."""
    spans = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in device_events(events)]
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
        "largest_gaps": [describe_gap(events, before[1], after[0]) for before, after in largest],
        "exposed_collectives_ms": exposed / 1e3 / steps,
        "compute_ms": sum(b - a for a, b in compute) / 1e3 / steps,
        "kernels_ms": dict(sorted(kernels.items(), key=lambda item: -item[1])[:25]),
    }


def describe_gap(events, begin, end):
    """What stands around a time in which the device has nothing to run, and what the host does in it.

    The kernel after it was launched "late" after the gap began, under some operations, outermost first; 0.00 is a
    kernel that was queued in time, and waited for another stream or rank.
    """
    timed = [e for e in events if "dur" in e and "ts" in e]
    device = [e for e in timed if e.get("cat") in BUSY]
    before = max((e for e in device if e["ts"] + e["dur"] <= begin + 1e-3), key=lambda e: e["ts"] + e["dur"])
    after = min((e for e in device if e["ts"] >= end - 1e-3), key=lambda e: e["ts"])
    calls = [e for e in timed if e.get("cat") in {"cuda_runtime", "cuda_driver"}]
    own = after["args"].get("correlation")
    launch = next((e for e in calls if e["args"].get("correlation") == own), None)
    waits = [e for e in calls if "ynchronize" in e["name"] and e["ts"] < end and e["ts"] + e["dur"] > begin]
    under = []
    if launch is not None:
        spans = (e for e in timed if e.get("cat") in {"cpu_op", "user_annotation"} and e["tid"] == launch["tid"])
        under = sorted((e for e in spans if e["ts"] <= launch["ts"] <= e["ts"] + e["dur"]), key=lambda e: e["ts"])
    return {
        "ms": round((end - begin) / 1e3, 2),
        "before": before["name"][:60],
        "after": after["name"][:60],
        "late_ms": 0.0 if launch is None else round(max(0.0, launch["ts"] - begin) / 1e3, 2),
        "under": [e["name"][:40] for e in under],
        "host_waits": sorted({e["name"] for e in waits}),
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
