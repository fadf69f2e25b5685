#!/usr/bin/env bash
# Recipe 6, instruction tuning and then preference optimization in one run; arguments go to `igla-mega train`:
#   laptop      examples/sft_dpo_7b.sh --scale laptop         (both on text from Python's standard library)
#   one node    examples/sft_dpo_7b.sh --models /data/models --run /data/runs/sft_dpo_7b --set data.tokenizer=/data/t \
#                 --set 'data.sources={instruction_dataset: /data/talk.jsonl, preference_dataset: /data/pairs.jsonl}'
# The same command resumes in the stage in which the run stopped; `igla-mega report RUN` shows both on one page.
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" sft_dpo_7b "$@"
