#!/usr/bin/env bash
# Recipe 4, low-rank adapters on a base in 4 bits (needs the extra `quant`); arguments go to `igla-mega train`:
#   laptop      examples/qlora_7b.sh --scale laptop           (docstrings -> functions, from Python's standard library)
#   one GPU     examples/qlora_7b.sh --models /data/models --run /data/runs/qlora_7b --set data.format=instructions \
#                 --set 'data.sources={mine: /data/mine.jsonl}' --set data.tokenizer=/data/models/llama-7b
# `igla-mega export RUN HF --merge` merges the adapters into the dequantized base that they were trained on.
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" qlora_7b "$@"
