#!/usr/bin/env bash
# Start a training script on every device, on one node or several.
#
#   bash train.sh FILE CONFIG [--key value ...]
#
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   the nodes and where they meet; one node by default
# NPROC_PER_NODE                                processes here; by default one per visible accelerator, else one
# CUDA_VISIBLE_DEVICES, ASCEND_RT_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES   which accelerators are visible
# NCCL_TIMEOUT                                  whole seconds that a collective may take, with any backend; goes before
#                                               train.timeout_seconds, and is read without train.sh too
# LOG_FILE                                      file that everything printed is appended to as well
# PYTHON                                        interpreter; by default the active environment's, else .venv's
#
# Exit code: 0 done; 70 fault; 75 stopped early and saved; 78 bad input.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

find_python() {
  if [[ -n "${PYTHON:-}" ]]; then
    echo "$PYTHON"
  elif [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" || ! -x "$here/.venv/bin/python" ]]; then
    echo python3
  else
    echo "$here/.venv/bin/python"
  fi
}

python="$(find_python)"

if [[ -n "${LOG_FILE:-}" ]]; then
  # The log must outlive the signals that ask the ranks to save and stop: without it, their next line would kill them.
  exec > >(trap '' INT TERM HUP USR1; exec tee -a -- "$LOG_FILE") 2>&1
fi

# The shell is replaced, so that signals and the exit code need no passing on.
exec "$python" -m veomni.launch.node "$@"
