#!/usr/bin/env bash
# What the examples share: examples/launch.sh RECIPE [arguments of `igla-mega train`]
# Under `srun` with a task a rank it is one of them (examples/slurm/train.sbatch does more: saves, requeues, resumes).
# Else it takes all GPUs of this machine; without one, $IGLA_CPU_RANKS ranks (1).
set -euo pipefail
PATH="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin:${PATH}"
recipe="$1"
shift

if (( ${SLURM_STEP_NUM_TASKS:-1} > 1 )); then
  exec igla-mega train "${recipe}" "$@"
fi
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if (( gpus > 0 )); then
  exec igla-mega train "${recipe}" --nproc "${gpus}" "$@"
else
  exec igla-mega train "${recipe}" --nproc "${IGLA_CPU_RANKS:-1}" "$@"
fi
