"""Save on one layout, load on another; damage, kill and lock out."""

from __future__ import annotations

import collections
import io
import json
import logging
import os
import pickle
import signal
from functools import partial

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.models.tiny import tiny_config
from tests.pairwise import Matrix
from tests.parity.layouts import LAYOUTS
from tests.together import Job, Together
from veomni.checkpoint import Checkpointer, read_model_tensors
from veomni.checkpoint.checkpointer import SaveFailedError
from veomni.checkpoint.manifest import describe_file
from veomni.checkpoint.safe_storage import MetadataUnpickler
from veomni.checkpoint.sharded_state import in_host_memory
from veomni.errors import CheckpointError
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.models.weights.export import full_tensors
from veomni.testing.documents import global_rows, share
from veomni.testing.ranks import run_ranks


def train(directory, layout, *, load, steps, save_at=None, async_save=False):
    """Train ``steps`` steps on a layout and return the whole model's parameters."""
    launcher = Launcher(LAYOUTS[layout][1](), accelerator="cpu", precision="fp64", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(build_model(tiny_config("qwen3"), weights="random")).train()
    optimizer = launcher.setup_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    checkpointer = Checkpointer(directory, async_save=async_save)
    if load:
        assert checkpointer.load_latest(state) == 2
    place = launcher.data_parallel
    loader = [share(global_rows(128), place.rank, place.size, 1)] * steps
    for batch in launcher.track(loader):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if batch.index == save_at:
            checkpointer.save(state, batch.index)
    checkpointer.close()
    found = {name: tensor.clone() for name, tensor in full_tensors(model)}
    launcher.close()
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run_ranks(train, 1, tmp_path_factory.mktemp("unbroken"), "single", load=False, steps=3, init=False)[0]


SOURCES = ("single", "ddp2", "fsdp1_full", "fsdp2_4", "hsdp_2x2")
PAIRS = Matrix(
    {"source": SOURCES, "target": ("single", "ddp2", "fsdp1_full", "fsdp2_2"), "async_save": (False, True)}
).cover()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """What a pair comes to: every source is saved once in each way, all on the same ranks, and loaded likewise."""
    folder = tmp_path_factory.mktemp("saved")

    def on(layout, source, async_save, **options):
        run = partial(train, folder / f"{source}{async_save}", layout, async_save=async_save, **options)
        return Job(LAYOUTS[layout][0], run)

    saves = [on(name, name, way, load=False, steps=2, save_at=2) for name in SOURCES for way in (False, True)]
    loads = [on(case["target"], case["source"], case["async_save"], load=True, steps=1) for case in PAIRS]
    saving, loading = Together(saves), Together(loads)
    for job in saves:
        saving(job)
    return lambda number: loading(loads[number])[0]


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=["-".join(map(str, case.values())) for case in PAIRS])
def test_any_layout_loads_what_any_other_saved(unbroken, resumed, number):
    found = resumed(number)
    for name, expected in unbroken.items():
        assert (found[name] - expected).norm() / expected.norm() < 1e-11, name


def copied_then_changed():
    model = torch.nn.Linear(4, 6, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    table = {"model.weight": model.weight, "optimizer.exp_avg": torch.ones(3), "optimizer.betas": (0.9, 0.99)}
    before = model.weight.full_tensor().clone()
    copies = in_host_memory(table)
    with torch.no_grad():
        model.weight.to_local().zero_()
        table["optimizer.exp_avg"].zero_()
    kept = copies["model.weight"]
    same = kept.placements == model.weight.placements and torch.equal(kept.full_tensor(), before)
    return same, copies["optimizer.exp_avg"].tolist(), copies["optimizer.betas"]


def test_what_a_background_save_writes_is_a_copy():
    assert run_ranks(copied_then_changed, 2) == [(True, [1.0, 1.0, 1.0], (0.9, 0.99))] * 2


class Counter:
    """An object with a state, as a loader is."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value, "tensor": torch.arange(self.value), "pair": (1, "two")}

    def load_state_dict(self, state):
        assert state["pair"] == (1, "two")
        assert len(state["tensor"]) == state["value"]
        self.value = state["value"]


def saved(directory, steps=(1, 2), keep_last=2):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    checkpointer = Checkpointer(directory, keep_last=keep_last)
    for step in steps:
        with torch.no_grad():
            model.weight.fill_(step)
        checkpointer.save({"model": model, "loader": Counter(step)}, step)
    checkpointer.close()


def load_latest(directory):
    model, counter = torch.nn.Linear(4, 4), Counter()
    checkpointer = Checkpointer(directory)
    try:
        return checkpointer.load_latest({"model": model, "loader": counter}), model.weight[0, 0].item(), counter.value
    finally:
        checkpointer.close()


def damage(path, how):
    if how == "bit flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "missing":
        path.unlink()
    elif how == "extra":
        (path.parent / "extra").write_text("x")


@pytest.mark.parametrize("how", ["bit flip", "truncated", "missing", "extra"])
@pytest.mark.parametrize("file", ["weights/__0_0.distcp", "weights/.metadata", "shared.json", "rank_0.safetensors"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, caplog, how, file):
    saved(tmp_path)
    damage(tmp_path / "global_step_2" / file, how)
    logging.getLogger("veomni").propagate = True
    with caplog.at_level(logging.WARNING):
        assert load_latest(tmp_path) == (1, 1.0, 1)
    assert "global_step_2 is damaged" in caplog.text
    assert ("extra" if how == "extra" else file) in caplog.text
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="global_step_2"):
        checkpointer.load({"model": torch.nn.Linear(4, 4)}, tmp_path / "global_step_2")
    checkpointer.close()


@pytest.mark.parametrize("content", [None, "", '{"version": 1', "[]"])
def test_without_a_whole_manifest_it_is_no_checkpoint(tmp_path, content):
    saved(tmp_path)
    manifest = tmp_path / "global_step_2" / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    assert load_latest(tmp_path)[0] == 1


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_metadata_that_runs_code_is_rejected(tmp_path):
    saved(tmp_path)
    canary, step = tmp_path / "canary", tmp_path / "global_step_2"
    (step / "weights" / ".metadata").write_bytes(pickle.dumps(Evil(canary)))
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["weights/.metadata"] = describe_file(step / "weights" / ".metadata")
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"refers to (posix|nt|os)\.system"):
        load_latest(tmp_path)
    assert not canary.exists()


class Attribute:
    """Pickled as the attribute of an object, which is how Python 3.11.2 pickles every member of an enumeration."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def unpickled(owner, name):
    return MetadataUnpickler(io.BytesIO(pickle.dumps(Attribute(owner, name)))).load()


def test_members_of_enumerations_are_read_and_no_other_attribute():
    contiguous = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert unpickled(_MEM_FORMAT_ENCODING, contiguous.name) is contiguous
    with pytest.raises(CheckpointError, match="attribute of"):
        unpickled(collections.OrderedDict, "fromkeys")
    with pytest.raises(KeyError):
        unpickled(_MEM_FORMAT_ENCODING, "__init__")


def killed_while_saving(directory, calls):
    """Die at the ``calls``-th durable file operation of a save."""
    fsync, count = os.fsync, iter(range(1000))

    def dying(descriptor):
        if next(count) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = dying
    saved(directory, steps=(2,))


def test_a_kill_at_any_moment_leaves_the_older_or_the_newer_checkpoint_whole(tmp_path):
    outcomes = set()
    for calls in range(12):
        directory = tmp_path / str(calls)
        saved(directory, steps=(1,))
        pid = os.fork()
        if not pid:
            killed_while_saving(directory, calls)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        step, weight, counter = load_latest(directory)
        assert (weight, counter) == (float(step), step)
        assert step == 2 or os.WIFSIGNALED(status)
        assert not [name for name in os.listdir(directory) if "tmp" in name]
        outcomes.add(step)
    assert outcomes == {1, 2}


def test_a_failing_disk_is_told_and_publishes_nothing(tmp_path, monkeypatch):
    saved(tmp_path, steps=(1,))
    fsync, count = os.fsync, iter(range(1000))

    def full(descriptor):
        if next(count) == 1:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveFailedError, match="No space left"):
        saved(tmp_path, steps=(2,))
    monkeypatch.undo()


def test_retention_order_and_foreign_directories(tmp_path):
    (tmp_path / "global_step_x").mkdir()
    (tmp_path / "notes").mkdir()
    saved(tmp_path, steps=(9, 10, 11), keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("global_step_*")) == [
        "global_step_10", "global_step_11", "global_step_x",
    ]  # fmt: skip
    assert load_latest(tmp_path)[0] == 11


def test_a_second_job_is_rejected_and_a_dead_one_is_not_in_the_way(tmp_path):
    first = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match=f"pid {os.getpid()}"):
        Checkpointer(tmp_path)
    first.close()
    pid = os.fork()
    if not pid:
        Checkpointer(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    Checkpointer(tmp_path).close()


def test_names_and_shapes_that_do_not_fit_are_named(tmp_path):
    saved(tmp_path)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.weight \(4, 4\) there, \(5, 4\) here"):
        checkpointer.load_latest({"model": torch.nn.Linear(4, 5)})
    with pytest.raises(CheckpointError, match=r"missing model\.0\.weight"):
        checkpointer.load_latest({"model": torch.nn.Sequential(torch.nn.Linear(4, 4))})
    checkpointer.close()


def test_tensors_are_read_without_the_model(tmp_path):
    saved(tmp_path)
    found = dict(read_model_tensors(tmp_path / "global_step_2"))
    assert found.keys() == {"weight", "bias"}
    assert (found["weight"] == 2).all()
