#!/usr/bin/env bash
# Recipe 7, eight experts, two per token; arguments go to `igla-mega train`:
#   laptop      examples/moe_8x7b.sh --scale laptop           (experts over two ranks, then a dense model)
#   clusters    sbatch --nodes 32 examples/slurm/train.sbatch moe_8x7b
# At laptop scale the last lines compare it with a dense model with as many active parameters, on as many tokens.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
PATH="${here}/../.venv/bin:${PATH}"

if [[ " $* " != *" --scale laptop "* ]]; then
  exec "${here}/launch.sh" moe_8x7b "$@"
fi
runs=runs/moe_8x7b-laptop
IGLA_CPU_RANKS=2 "${here}/launch.sh" moe_8x7b --run "${runs}/experts" "$@"
echo "=== dense model with as many active parameters"
IGLA_CPU_RANKS=2 "${here}/launch.sh" moe_8x7b --run "${runs}/dense" "$@" --set moe=null \
  --set training.expert_capacity_factor=null --set model.intermediate_size=347
for run in experts dense; do
  echo "=== ${run}"
  igla-mega eval "${runs}/${run}"
done
