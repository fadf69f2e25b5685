"""What `--scale laptop` trains on where the user gave nothing: a small corpus made once from Python's own texts."""

import os
import sys
import tempfile
from pathlib import Path

from igla_mega.config.schema import Recipe
from igla_mega.data.preprocess import prepare_sources
from igla_mega.data.tokenizer import train_bpe
from igla_mega.data.toy_corpus import write_toy_corpus


def cache_dir() -> Path:
    """$IGLA_CACHE, or ~/.cache/igla_mega."""
    return Path(os.environ.get("IGLA_CACHE") or Path.home() / ".cache" / "igla_mega")


def with_data(recipe: Recipe, *, make: bool = True) -> Recipe:
    """The recipe with data to train on; one that names its own sources stays as it is.

    Args:
        make: write corpus, tokenizer and datasets where they are not there yet, and say so.
    """
    if recipe.data.sources or recipe.model is None:
        return recipe
    vocab_size = recipe.model.vocab_size
    root = cache_dir() / f"toy_corpus_python{sys.version_info.major}.{sys.version_info.minor}"
    tokenizer = root / f"tokenizer_{vocab_size}"
    data = recipe.data.model_copy(
        update={
            "sources": {name: str(root / f"{name}.jsonl") for name in recipe.data.mix},
            "tokenizer": str(tokenizer),
            "prepared": str(root / f"prepared_{vocab_size}"),
        }
    )
    if make:
        if not all((root / f"{name}.jsonl").is_file() for name in data.sources):
            _say(f"no data.sources given: writing a corpus of Python's own texts to {root} (once)")
            # Complete or not there: a killed start leaves no half corpus behind.
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as unfinished:
                for path in write_toy_corpus(unfinished).values():
                    path.rename(root / path.name)
        if not (tokenizer / "tokenizer.json").is_file():
            _say(f"no data.tokenizer given: training one of {vocab_size} tokens on it (once)")
            train_bpe(sorted(root.glob("*.jsonl")), vocab_size, tokenizer)
        ready = Path(data.prepared or "") / "manifest.json"
        if not ready.is_file():
            prepare_sources(data)
    return recipe.model_copy(update={"data": data})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
