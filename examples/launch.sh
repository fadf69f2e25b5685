#!/usr/bin/env bash
# What the examples share: examples/launch.sh RECIPE [arguments of `igla-mega train`]
# On GPUs it takes all of this node's, under Slurm also the other nodes'; without one, $IGLA_CPU_RANKS ranks (1).
set -euo pipefail
PATH="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin:${PATH}"
recipe="$1"
shift

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"

if (( ${SLURM_NNODES:-1} > 1 )); then
  rendezvous="$(scontrol show hostnames "${SLURM_JOB_NODELIST}" | head -n 1)"
  exec torchrun --nnodes "${SLURM_NNODES}" --node-rank "${SLURM_NODEID}" --nproc-per-node "${gpus}" \
    --rdzv-id "${SLURM_JOB_ID}" --rdzv-backend c10d --rdzv-endpoint "${rendezvous}:${MASTER_PORT:-29500}" \
    -m igla_mega train "${recipe}" "$@"
elif (( gpus > 0 )); then
  exec igla-mega train "${recipe}" --nproc "${gpus}" "$@"
else
  exec igla-mega train "${recipe}" --nproc "${IGLA_CPU_RANKS:-1}" "$@"
fi
