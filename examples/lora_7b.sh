#!/usr/bin/env bash
# Recipe 3, low-rank adapters on a frozen base; arguments go to `igla-mega train`:
#   laptop      examples/lora_7b.sh --scale laptop            (docstrings -> functions, from Python's standard library)
#   one GPU     examples/lora_7b.sh --models /data/models --run /data/runs/lora_7b --set data.format=instructions \
#                 --set 'data.sources={mine: /data/mine.jsonl}' --set data.tokenizer=/data/models/llama-7b
# The last lines are the loss of held-out answers before and after training. Export for PEFT, or merged into the base:
#   igla-mega export runs/lora_7b-laptop ADAPTER --adapter-only        igla-mega export runs/lora_7b-laptop HF --merge
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" lora_7b "$@"
