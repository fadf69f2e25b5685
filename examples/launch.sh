#!/usr/bin/env bash
# Start a recipe, for the other examples: examples/launch.sh RECIPE [arguments of `igla-mega train`]
# Under `srun` with one task per rank it is one of the ranks (examples/slurm/train.sbatch also saves, requeues, resumes).
# Otherwise it uses all GPUs of this machine, or without a GPU $IGLA_CPU_RANKS ranks (default 1).
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
