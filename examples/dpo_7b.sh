#!/usr/bin/env bash
# Recipe 5, direct preference optimization; arguments go to `igla-mega train`:
#   laptop      examples/dpo_7b.sh --scale laptop             (prefers Python that parses over Python that does not)
#   one node    examples/dpo_7b.sh --models /data/models --run /data/runs/dpo_7b \
#                 --set 'data.sources={mine: /data/pairs.jsonl}' --set data.tokenizer=/data/models/llama-7b-sft
# The last line is the share of held-out pairs whose chosen answer is more likely, before and after training.
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" dpo_7b "$@"
