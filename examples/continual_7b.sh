#!/usr/bin/env bash
# Recipe 8, three domains in sequence; arguments go to `igla-mega train`:
#   laptop      examples/continual_7b.sh --scale laptop        (three times: without EWC, with EWC, with replay)
#   one node    examples/continual_7b.sh --run /data/runs/continual_7b
#   many nodes  sbatch --nodes 8 examples/slurm/train.sbatch continual_7b
# Each run prints its forgetting matrix, and `igla-mega report RUN` draws it; docs/ewc.md explains how to read it.
set -euo pipefail
launch="$(dirname "${BASH_SOURCE[0]}")/launch.sh"

if [[ " $* " != *" --scale laptop "* ]]; then
  exec "${launch}" continual_7b "$@"
fi
compare() {
  echo "=== $1"
  "${launch}" continual_7b --run "runs/continual_7b-laptop/$1" "${@:2}"
}
compare none "$@" --set continual.ewc_lambda=0
compare ewc "$@"
compare replay "$@" --set continual.ewc_lambda=0 --set continual.replay=0.1
