#!/usr/bin/env python
"""Convert text to Megatron's indexed datasets, with the flags of Megatron-LM's tools/preprocess_data.py.

Writes <output-prefix>_<key>_document.bin, .idx and .manifest.json for each of --json-keys. After a kill or a full disk,
the same command resumes. Reads JSONL, plain text (*.txt) and Parquet; the first two also compressed as .gz, .zst, .bz2
or .xz.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from igla_mega.config.errors import ConfigError
from igla_mega.data.tokenizer import load_tokenizer
from igla_mega.prepare.filters import Filters
from igla_mega.prepare.merge import complete_parts, merge
from igla_mega.prepare.preprocess import Options, Settings, part_prefix, preprocess
from igla_mega.prepare.sources import parse_part

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer", "GPTSentencePieceTokenizer")


def main() -> int:
    """Prepare every key of --json-keys; return the exit code."""
    args = _arguments()
    try:
        if args.tokenizer_type not in TOKENIZER_TYPES:
            raise ConfigError(
                f"--tokenizer-type: {args.tokenizer_type} is not supported; {', '.join(TOKENIZER_TYPES)} are.\n"
                "  Save the tokenizer as a Hugging Face folder and give it as --tokenizer-model."
            )
        part = parse_part(args.shard)
        for key in args.json_keys:
            prefix = f"{args.output_prefix}_{key}_document"
            options = Options(
                text_key=key,
                append_eod=args.append_eod,
                add_bos=args.add_bos or ("auto" if args.tokenizer_hf_include_special_tokens else "never"),
                on_error="skip" if args.skip_broken_lines else args.on_error,
                text_documents=args.text_documents,
                language_key=args.language_key,
                filters=Filters(args.min_characters, args.max_characters, args.max_symbol_ratio),
                exact_duplicates=args.exact_duplicates,
            )
            if args.engine == "ray":
                from igla_mega.prepare.ray import Cluster, preprocess_on_ray

                cluster, settings = Cluster(args.ray_address, args.parts), Settings(workers=args.workers)
                preprocess_on_ray(args.input, prefix, args.tokenizer_model, options, settings, cluster)
                continue
            settings = Settings(
                workers=args.workers,
                part=part,
                shard_bytes=int(args.shard_mb * (1 << 20)),
                fast_path=not args.reference_tokenizer,
                dry_run=args.dry_run,
            )
            tokenizer = load_tokenizer(args.tokenizer_model)
            preprocess(args.input, part_prefix(prefix, part), tokenizer, options=options, settings=settings)
            if args.merge and (parts := complete_parts(prefix, part[1])):
                merge(prefix, parts)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, patterns, or folders")
    add("--output-prefix", required=True, help="path of the output without its extension")
    add("--json-keys", nargs="+", default=["text"], help="keys (columns) of the text (default: text)")
    add(
        "--tokenizer-type",
        default="HuggingFaceTokenizer",
        help="accepted for compatibility; the type is detected from the file",
    )
    add("--tokenizer-model", required=True, help="Hugging Face folder, tokenizer.json, SentencePiece or tiktoken file")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token, once")
    add(
        "--tokenizer-hf-include-special-tokens",
        action="store_true",
        help="Megatron's flag: begin each document as the tokenizer's own library does (the same as --add-bos auto)",
    )
    add(
        "--add-bos",
        choices=("auto", "always", "never"),
        help="begin-of-text token in front of each document: as the tokenizer's own library does, always, or never "
        "(default: never, as Megatron's tool; a recipe's data.add_bos is auto)",
    )
    add("--workers", type=int, help="threads or processes; the output is the same for any number")
    add(
        "--on-error",
        choices=("stop", "skip", "quarantine"),
        default="stop",
        help="handling of a record without text",
    )
    add("--skip-broken-lines", action="store_true", help="the same as --on-error skip")
    add("--text-documents", choices=("file", "line"), default="file", help="unit of plain text that is one document")
    add("--language-key", help="key of a language tag; documents are counted by it")
    add("--min-characters", type=int, help="drop shorter documents")
    add("--max-characters", type=int, help="drop longer documents")
    add(
        "--max-symbol-ratio",
        type=float,
        help="drop documents with a larger share of characters that are neither letters nor digits",
    )
    add("--exact-duplicates", action="store_true", help="drop exact repetitions of earlier documents")
    add("--dry-run", action="store_true", help="count documents and tokens without writing anything")
    add("--shard", default="0/1", metavar="I/N", help="prepare part I (from 0) of N, for an array of jobs")
    add("--merge", action="store_true", help="with --shard: merge the parts when this is the last one to finish")
    add("--engine", choices=("local", "ray"), default="local", help="ray: spread --parts over a Ray cluster")
    add(
        "--parts",
        type=int,
        help="with --engine ray: number of parts (default: one per node of the cluster, at least 2)",
    )
    add(
        "--ray-address",
        default=os.environ.get("RAY_ADDRESS"),
        help="address of the Ray cluster (default: $RAY_ADDRESS, or local)",
    )
    add("--shard-mb", type=float, default=256, help="MiB of input between two records of progress")
    add("--reference-tokenizer", action="store_true", help="do not use gigatoken")
    # Flags of Megatron-LM's tool without an effect here, accepted so that its command lines work.
    add("--partitions", type=int, help=argparse.SUPPRESS)
    add("--log-interval", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
