"""How long saving stops a run: an asynchronous checkpoint beside ``dcp.async_save``, an export beside torch's writer.

    python benchmarks/saving.py --gpus 4 --row dense --folder /tmp/saving

The model and fused AdamW of a row of benchmarks/scale.py, after one step. Each is done twice, since the first save also
allocates host memory. Printed are the seconds of the slowest rank, of the second save and in brackets of the first: how
long the loop is stopped, and how long until everything is on disk. Both exports write fp32 safetensors.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.rows import ROWS
from benchmarks.stacks import ours


def states_of(model, optimizer):
    """What torch's own example saves."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def save_ours(checkpointer, model, optimizer, number):
    """Return the function that waits for the end of the save."""
    checkpointer.save({"model": model, "optimizer": optimizer}, number)
    return checkpointer.wait


def save_torch(folder, group, model, optimizer, number):
    import torch.distributed.checkpoint as dcp

    pending = dcp.async_save(states_of(model, optimizer), checkpoint_id=folder / f"dcp_{number}", process_group=group)
    return pending.result


def export_torch(folder, model, number):
    """One file of whole tensors, as Hugging Face reads them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    writer = HuggingFaceStorageWriter(
        str(folder / f"hf_torch_{number}"), save_distributed=True, enable_consolidation=True
    )
    state = get_model_state_dict(model)
    weights = {tensor.to_local().data_ptr() or name: (name, tensor) for name, tensor in state.items()}
    dcp.save(dict(weights.values()), storage_writer=writer)  # of tied parameters, which safetensors reject, one
    return lambda: None


def timed(launcher, act):
    """Seconds until ``act`` returned and until what it returned did too, of the slowest rank."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    begin = time.perf_counter()
    wait = act()
    stopped = time.perf_counter() - begin
    wait()
    found = [None] * launcher.world_size
    dist.all_gather_object(found, (stopped, time.perf_counter() - begin))
    return max(a for a, _ in found), max(b for _, b in found)


def compare(launcher, title, ways):
    """Time each way twice and print both; ways are this library's, then torch's."""
    seconds = {}
    for name, act in ways.items():
        seconds[name] = [timed(launcher, lambda act=act, number=number: act(number)) for number in (1, 2)]
        if launcher.is_rank_zero:
            (first, all_first), (again, all_again) = seconds[name]
            print(
                f"{title:10s} {name:24s} stops for {again:6.2f} s ({first:.2f}), "
                f"done after {all_again:6.2f} s ({all_first:.2f})",
                flush=True,
            )
    own, other = (each[1][0] for each in seconds.values())
    if launcher.is_rank_zero:
        print(
            f"{title:10s} ours stops for {own / other:.2f} of torch's time, torch's takes {other / own:.2f} times ours",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--row", default="dense", choices=ROWS)
    parser.add_argument("--folder", type=Path, help="where to save; the system's temporary folder otherwise")
    args = parser.parse_args()
    launcher, model = ours.prepare(ROWS[args.row], args.gpus)
    import torch.distributed as dist

    from veomni.checkpoint import Checkpointer

    optimizer = ours.optimizer_of(ROWS[args.row], launcher, model)
    next(ours.steps_of(ROWS[args.row], launcher, model, optimizer))
    folder = [tempfile.mkdtemp(dir=args.folder) if launcher.is_rank_zero else None]
    dist.broadcast_object_list(folder)
    folder, group = Path(folder[0]), dist.new_group(backend="gloo")
    checkpointer = Checkpointer(folder / "ours", async_save=True)
    try:
        compare(launcher, "checkpoint", {
            "ours, async_save": lambda number: save_ours(checkpointer, model, optimizer, number),
            "dcp.async_save": lambda number: save_torch(folder, group, model, optimizer, number),
        })  # fmt: skip
        compare(launcher, "export", {
            "ours, launcher.export": lambda number: (launcher.export(model, folder / f"hf_{number}"), lambda: None)[1],
            "HuggingFaceStorageWriter": lambda number: export_torch(folder, model, number),
        })  # fmt: skip
    finally:
        checkpointer.close()
        if launcher.is_rank_zero:
            shutil.rmtree(folder, ignore_errors=True)
    launcher.close()


if __name__ == "__main__":
    main()
