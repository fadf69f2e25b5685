#!/usr/bin/env bash
# Recipe 2, 131,072 tokens of context over the GPUs of a node; arguments go to `igla-mega train`:
#   laptop      examples/koshey_7b.sh --scale laptop          (two ranks share each sequence of 256 tokens)
#   clusters    sbatch --nodes 16 examples/slurm/train.sbatch koshey_7b
IGLA_CPU_RANKS=2 exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" koshey_7b "$@"
