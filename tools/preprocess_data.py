#!/usr/bin/env python
"""JSONL to Megatron's indexed datasets, with the flags of Megatron-LM's tools/preprocess_data.py.

Writes <output-prefix>_<key>_document.bin and .idx for each of --json-keys.
"""

import argparse
import sys

from igla_mega.config.errors import ConfigError
from igla_mega.data.preprocess import preprocess
from igla_mega.data.tokenizer import load_tokenizer


def main() -> int:
    args = _arguments()
    try:
        if args.tokenizer_type != "HuggingFaceTokenizer":
            raise ConfigError(
                f"--tokenizer-type: {args.tokenizer_type} is not read; only HuggingFaceTokenizer is.\n"
                "  Save the tokenizer as a Hugging Face folder and give it as --tokenizer-model."
            )
        tokenizer = load_tokenizer(args.tokenizer_model)
        for key in args.json_keys:
            preprocess(
                args.input,
                f"{args.output_prefix}_{key}_document",
                tokenizer,
                text_key=key,
                append_eod=args.append_eod,
                skip_broken_lines=args.skip_broken_lines,
                workers=args.workers,
            )
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="JSONL files, patterns, or folders of *.jsonl")
    parser.add_argument("--output-prefix", required=True, help="path of the output without its ending")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the text (default: text)")
    parser.add_argument("--tokenizer-type", default="HuggingFaceTokenizer", help="only HuggingFaceTokenizer")
    parser.add_argument("--tokenizer-model", required=True, help="Hugging Face folder or tokenizer.json")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--workers", type=int, help="processes; the output is the same for any number")
    parser.add_argument("--skip-broken-lines", action="store_true", help="leave them out and count them")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
