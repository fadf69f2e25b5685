#!/usr/bin/env bash
# Recipe 1, the same command everywhere; arguments go to `igla-mega train`:
#   laptop      examples/pretrain_7b.sh --scale laptop --nproc 2
#   one node    examples/pretrain_7b.sh --run /data/runs/pretrain_7b
#   many nodes  sbatch examples/slurm/pretrain_7b.sbatch      (the same as train.sbatch pretrain_7b)
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" pretrain_7b "$@"
