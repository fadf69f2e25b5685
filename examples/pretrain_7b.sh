#!/usr/bin/env bash
# Recipe 1, the same command everywhere; arguments go to `igla-mega train`:
#   laptop      examples/pretrain_7b.sh --scale laptop --nproc 2
#   one node    examples/pretrain_7b.sh --run /data/runs/pretrain_7b
#   many nodes  sbatch examples/slurm/pretrain_7b.sbatch      (srun starts this file once on each node)
set -euo pipefail
PATH="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin:${PATH}"

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"

if (( ${SLURM_NNODES:-1} > 1 )); then
  rendezvous="$(scontrol show hostnames "${SLURM_JOB_NODELIST}" | head -n 1)"
  exec torchrun --nnodes "${SLURM_NNODES}" --node-rank "${SLURM_NODEID}" --nproc-per-node "${gpus}" \
    --rdzv-id "${SLURM_JOB_ID}" --rdzv-backend c10d --rdzv-endpoint "${rendezvous}:${MASTER_PORT:-29500}" \
    -m igla_mega train pretrain_7b "$@"
elif (( gpus > 0 )); then
  exec igla-mega train pretrain_7b --nproc "${gpus}" "$@"
else
  exec igla-mega train pretrain_7b "$@"
fi
