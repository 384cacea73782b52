#!/usr/bin/env bash
# All GPUs of this node:               launch/deepspeed.sh run --config c.yaml
# The nodes of a host file, over ssh:  HOSTFILE=hostfile launch/deepspeed.sh run --config c.yaml
set -euo pipefail

args=()
if [[ -n "${HOSTFILE:-}" ]]; then args+=(--hostfile "$HOSTFILE"); fi
if [[ -n "${NPROC:-}" ]]; then args+=(--num_gpus "$NPROC"); fi
exec deepspeed "${args[@]}" --module grads_dist "$@"
