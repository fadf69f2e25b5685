"""Provide defaults for `--scale laptop`: a small corpus from Python's own texts, and a base model trained on it."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from igla_mega.config import load
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Data, Recipe
from igla_mega.data.prepared import source_prefixes
from igla_mega.data.tokenizer import train_bpe
from igla_mega.prepare.preprocess import Options
from igla_mega.prepare.samples import prepare_samples
from igla_mega.prepare.sources import options_of, prepare_sources
from igla_mega.prepare.toy_corpus import write_toy_corpus
from igla_mega.prepare.toy_tasks import write_instructions, write_preferences

BASE_STEPS = 150
"""Training steps of the base model."""
BASE_SHAPE = {"hidden_size": 128, "intermediate_size": 344}
"""Shape of the base model: half as wide as recipe 1's at laptop scale, so that training takes minutes."""
NUM_CONVERSATIONS, NUM_PAIRS = 1500, 900
"""Number of samples for fine-tuning at laptop scale, including those held out."""
DOMAINS = ("code", "books", "conversation")
"""Sources assigned in order to phases whose names are not sources."""


def cache_dir() -> Path:
    """Return $IGLA_CACHE, or ~/.cache/igla_mega if it is not set."""
    return Path(os.environ.get("IGLA_CACHE") or Path.home() / ".cache" / "igla_mega")


def supplied(recipe: Recipe, models: Path | None, *, num_ranks: int, make: bool = True) -> Recipe:
    """Return the recipe with data and, if it starts from a base model, with that; arguments as for `with_base`."""
    # The data of a base model has the base's tokenizer, whatever `model:` says.
    return with_base(
        recipe if recipe.base_model else with_data(recipe, make=make), models, num_ranks=num_ranks, make=make
    )


def with_data(recipe: Recipe, *, make: bool = True) -> Recipe:
    """Return the recipe with the toy corpus as its data; a recipe with sources is returned unchanged.

    Args:
        make: True to write the corpus, tokenizer and datasets that do not exist yet.
    """
    if recipe.data.sources or recipe.model is None:
        return recipe
    vocab_size = recipe.model.vocab_size
    mix = recipe.data.mix or load.load_recipe("pretrain_7b").data.mix
    root = cache_dir() / f"toy_corpus_python{sys.version_info.major}.{sys.version_info.minor}"
    tokenizer = root / f"tokenizer_{vocab_size}"
    data = recipe.data.with_keys(
        {
            "mix": mix,
            "sources": {name: str(root / f"{name}.jsonl") for name in mix},
            "tokenizer": str(tokenizer),
            "prepared": str(root / f"prepared_{vocab_size}{_suffix(recipe.data)}"),
        }
    )
    if make:
        if not all((root / f"{name}.jsonl").is_file() for name in data.sources):
            _say(f"data.sources is empty: writing a corpus of Python's own texts to {root} (once)")
            # Written elsewhere and renamed, so that an interrupted start leaves no half-written corpus.
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as unfinished:
                for path in write_toy_corpus(unfinished).values():
                    path.rename(root / path.name)
        if not (tokenizer / "tokenizer.json").is_file():
            _say(f"data.tokenizer is not set: training one with {vocab_size} tokens on this corpus (once)")
            train_bpe(sorted(root.glob("*.jsonl")), vocab_size, tokenizer)
        if not all(Path(f"{prefix}.idx").is_file() for prefix in source_prefixes(data).values()):
            prepare_sources(data)
    return _with_domains(recipe.with_keys({"data": data}), say=make)


def with_base(recipe: Recipe, models: Path | None, *, num_ranks: int, make: bool = True) -> Recipe:
    """Return the recipe with a base model and data; a recipe whose base model exists is returned unchanged.

    Args:
        models: folder in which `base_model` is looked up.
        num_ranks: number of ranks that train the base model.
        make: True to train the base model if it does not exist yet.

    Raises:
        ConfigError: the training failed.
    """
    if recipe.stages is not None:
        first, *others = recipe.stages
        first = with_base(first, models, num_ranks=num_ranks, make=make)
        # If the first stage's base model existed, the user's data exists too, and nothing is substituted.
        others = [
            _with_tasks(stage, make=make) if _needs_tasks(stage) and _is_ours(first) else stage for stage in others
        ]
        return recipe.with_keys({"stages": (first, *others)})
    if recipe.base_model is None:
        return recipe
    try:
        load.base_folder(recipe.base_model, models)
        return recipe
    except ConfigError:
        if "/" in recipe.base_model:  # a path, not a name
            raise
    folder = _base_folder()
    if make and not (folder / "manifest.json").is_file():
        _say(
            f"base_model: {recipe.base_model} does not exist: training recipe 1 at laptop scale, half as wide, "
            f"instead, {BASE_STEPS} steps, into {folder} (once)"
        )
        _train_base(folder, num_ranks)
    elif make:
        _say(f"base_model: {recipe.base_model} does not exist; using recipe 1's at laptop scale instead: {folder}")
    recipe = recipe.with_keys({"base_model": str(folder)})
    if recipe.data.sources:
        return recipe
    if _needs_tasks(recipe):
        return _with_tasks(recipe, make=make)
    data = with_data(load.load_recipe("pretrain_7b", scale="laptop"), make=make).data
    update = {key: getattr(data, key) for key in ("mix", "sources", "tokenizer", "prepared")}
    recipe = recipe.with_keys({"data": recipe.data.with_keys(update)})
    if recipe.continual is not None and recipe.continual.base_data is None:
        recipe = recipe.with_keys({"continual.base_data": "mix"})
    return _with_domains(recipe, say=make)


def _suffix(data: Data) -> str:
    """Return what sets the prepared data of other options than the defaults apart; empty for the defaults."""
    options = options_of(data)
    return "" if options == Options() else "_" + hashlib.sha256(repr(options).encode()).hexdigest()[:8]


def _base_folder() -> Path:
    """Return the checkpoint folder of the base model that this module trains."""
    return cache_dir() / "models" / "pretrain_7b-laptop-half"


def _is_ours(recipe: Recipe) -> bool:
    """Return True if the recipe starts from the base model that this module trains."""
    return recipe.base_model == str(_base_folder())


def _needs_tasks(recipe: Recipe) -> bool:
    """Return True if a recipe without sources trains on conversations or pairs, or trains adapters."""
    return not recipe.data.sources and (recipe.form != "text" or recipe.lora is not None)


def _with_tasks(recipe: Recipe, *, make: bool) -> Recipe:
    """Return the recipe with conversations or pairs from Python's standard library, in the base model's tokens."""
    form = "instructions" if recipe.form == "text" else recipe.form
    section = recipe.sft or recipe.dpo
    name = section.data if section is not None and section.data else form
    corpus = with_data(load.load_recipe("pretrain_7b", scale="laptop"), make=make).data
    root = Path(corpus.prepared or "").parent / "tasks"
    file = root / f"{form}.jsonl"
    update = {
        "format": form,
        "sources": {name: str(file)},
        "tokenizer": corpus.tokenizer,
        "prepared": str(root / f"prepared_{form}"),
        "chat_template": recipe.data.chat_template or "plain",
        "too_long": "skip",
    }
    recipe = recipe.with_keys({"data": recipe.data.with_keys(update)})
    if make:
        if not file.is_file():
            _say(f"data.sources is empty: writing {form.replace('_', ' ')} from Python's library to {file} (once)")
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as unfinished:
                written = Path(unfinished, file.name)
                if form == "instructions":
                    write_instructions(written, NUM_CONVERSATIONS)
                else:
                    write_preferences(written, NUM_PAIRS)
                written.rename(file)
        prepare_samples(recipe)
    return recipe


def _train_base(folder: Path, num_ranks: int) -> None:
    """Train the base model in a subprocess and move its checkpoint to `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    changes = [f"training.total_steps={BASE_STEPS}", "checkpoint.every_steps=0", "evaluation.every_steps=0"]
    changes += [f"model.{key}={size}" for key, size in BASE_SHAPE.items()]
    with tempfile.TemporaryDirectory(dir=folder.parent) as run:
        words = ["train", "pretrain_7b", "--scale", "laptop", "--nproc", str(num_ranks), "--run", run]
        words += [word for change in changes for word in ("--set", change)]
        if subprocess.run([sys.executable, "-m", "igla_mega", *words]).returncode:
            raise ConfigError("base_model: training recipe 1 at laptop scale failed. See the error above.")
        (Path(run) / "checkpoints" / f"step_{BASE_STEPS:08d}").rename(folder)


def _with_domains(recipe: Recipe, *, say: bool) -> Recipe:
    """Return the recipe with a source of `DOMAINS` assigned to each phase whose name is not a source."""
    if recipe.curriculum is None:
        return recipe
    known = {"mix", *recipe.data.sources}
    unknown = [phase for phase in recipe.curriculum.phases if phase.data is None and phase.name not in known]
    domains = {phase.name: DOMAINS[i % len(DOMAINS)] for i, phase in enumerate(unknown)}
    if domains and say:
        _say("data.sources is empty: " + ", ".join(f"{name} is {source}" for name, source in domains.items()))
    phases = tuple(
        phase.with_keys({"data": domains[phase.name]}) if phase.name in domains else phase
        for phase in recipe.curriculum.phases
    )
    return recipe.with_keys({"curriculum.phases": phases})


def _say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)
