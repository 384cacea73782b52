#!/usr/bin/env bash
# NPROC ranks, of Open MPI or MPICH:   NPROC=8 launch/mpirun.sh run --config c.yaml
# Over nodes:                          NPROC=16 launch/mpirun.sh --hostfile hosts -- run --config c.yaml
# What stands before a `--` goes to mpiexec.
set -euo pipefail

options=()
if [[ " $* " == *" -- "* ]]; then
    while [[ "$1" != "--" ]]; do options+=("$1"); shift; done
    shift
fi
exec mpiexec -n "${NPROC:?number of ranks}" "${options[@]}" python -m grads_dist "$@"
