#!/usr/bin/env python
"""Write the toy corpus: five JSONL sources and, with --vocab-size, a tokenizer trained on them."""

import argparse
import sys
from pathlib import Path

from igla_mega.config.errors import ConfigError
from igla_mega.data.tokenizer import train_bpe
from igla_mega.prepare.toy_corpus import write_toy_corpus


def main() -> int:
    """Write the corpus; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path, help="folder for <source>.jsonl and tokenizer/")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the documents")
    parser.add_argument(
        "--vocab-size", type=int, help="also train a byte-level BPE with this many ids into OUT_DIR/tokenizer"
    )
    args = parser.parse_args()
    try:
        files = write_toy_corpus(args.out_dir, seed=args.seed)
        if args.vocab_size:
            tokenizer = train_bpe(list(files.values()), args.vocab_size, args.out_dir / "tokenizer")
            print(f"{tokenizer.path}: {tokenizer.vocab_size} ids", file=sys.stderr)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
