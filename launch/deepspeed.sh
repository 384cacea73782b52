#!/usr/bin/env bash
# All GPUs of this node:               launch/deepspeed.sh run --config c.yaml
# The nodes of a host file, over ssh:  HOSTFILE=hostfile launch/deepspeed.sh run --config c.yaml
# NPROC is the number of ranks a node. What stands before a `--` goes to deepspeed.
set -euo pipefail

options=()
if [[ " $* " == *" -- "* ]]; then
    while [[ "$1" != "--" ]]; do options+=("$1"); shift; done
    shift
fi
args=()
if [[ -n "${HOSTFILE:-}" ]]; then args+=(--hostfile "$HOSTFILE"); fi
if [[ -n "${NPROC:-}" ]]; then args+=(--num_gpus "$NPROC"); fi
exec deepspeed "${args[@]}" "${options[@]}" --module grads_dist "$@"
