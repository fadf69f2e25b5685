#!/usr/bin/env bash
# Recipe 5, direct preference optimization; arguments go to `igla-mega train`:
#   laptop      examples/dpo_7b.sh --scale laptop             (Python that parses is preferred to Python that does not)
#   one node    examples/dpo_7b.sh --models /data/models --run /data/runs/dpo_7b \
#                 --set 'data.sources={mine: /data/pairs.jsonl}' --set data.tokenizer=/data/models/llama-7b-sft
# The last line says in how many held-out pairs the chosen answer is the likelier one, before and after.
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" dpo_7b "$@"
