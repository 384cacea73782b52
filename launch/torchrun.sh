#!/usr/bin/env bash
# One node, one rank a GPU:            launch/torchrun.sh run --config c.yaml
# More nodes, on each of them:         NNODES=4 HEAD=node0:29500 launch/torchrun.sh run --config c.yaml
# NPROC is the number of ranks a node. What stands before a `--` goes to torchrun.
set -euo pipefail

options=()
if [[ " $* " == *" -- "* ]]; then
    while [[ "$1" != "--" ]]; do options+=("$1"); shift; done
    shift
fi
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi --list-gpus | wc -l); else gpus=1; fi
args=(--nproc-per-node "${NPROC:-$gpus}")
if [[ -n "${HEAD:-}" ]]; then
    args+=(--nnodes "${NNODES:?number of nodes}" --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${JOB:-grads_dist}")
else
    args+=(--standalone)
fi
exec torchrun "${args[@]}" "${options[@]}" -m grads_dist "$@"
