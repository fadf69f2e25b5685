"""What `--scale laptop` starts from where the user gave nothing: a small corpus made once from Python's own texts, and
recipe 1's model, trained on it once."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from igla_mega.config import load
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.data.tokenizer import train_bpe
from igla_mega.prepare.samples import prepare_samples
from igla_mega.prepare.sources import prepare_sources
from igla_mega.prepare.toy_corpus import write_toy_corpus
from igla_mega.prepare.toy_tasks import write_instructions, write_preferences

BASE_STEPS = 150
BASE_SHAPE = {"hidden_size": 128, "intermediate_size": 344}
"""Of the base model: half as wide as recipe 1's at laptop scale, so that it and what follows take minutes."""
NUM_CONVERSATIONS, NUM_PAIRS = 1500, 900
"""That fine-tuning at laptop scale learns from, some held out."""
DOMAINS = ("code", "books", "conversation")
"""Sources that phases of unknown names learn, in order: programs, reference prose, dialogues."""


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
    mix = recipe.data.mix or load.load_recipe("pretrain_7b").data.mix
    root = cache_dir() / f"toy_corpus_python{sys.version_info.major}.{sys.version_info.minor}"
    tokenizer = root / f"tokenizer_{vocab_size}"
    data = recipe.data.model_copy(
        update={
            "mix": mix,
            "sources": {name: str(root / f"{name}.jsonl") for name in mix},
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
    return _with_domains(recipe.model_copy(update={"data": data}), say=make)


def with_base(recipe: Recipe, models: Path | None, *, num_ranks: int, make: bool = True) -> Recipe:
    """The recipe with a base model to start from and its data; one whose base is there stays as it is.

    Args:
        models: folder below which `base_model` is looked up.
        num_ranks: that train the base.
        make: train it where it is not there yet, and say so.

    Raises:
        ConfigError: it could not be trained.
    """
    if recipe.stages is not None:
        first, *others = recipe.stages
        first = with_base(first, models, num_ranks=num_ranks, make=make)
        # Where the first stage's base was there, so is its data.
        others = [
            _with_tasks(stage, make=make) if _needs_tasks(stage) and _is_ours(first) else stage for stage in others
        ]
        return recipe.model_copy(update={"stages": (first, *others)})
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
            f"base_model: {recipe.base_model} is not there: training recipe 1 at laptop scale, half as wide, in its "
            f"place, {BASE_STEPS} steps, into {folder} (once)"
        )
        _train_base(folder, num_ranks)
    elif make:
        _say(f"base_model: {recipe.base_model} is not there; recipe 1's at laptop scale takes its place: {folder}")
    recipe = recipe.model_copy(update={"base_model": str(folder)})
    if recipe.data.sources:
        return recipe
    if _needs_tasks(recipe):
        return _with_tasks(recipe, make=make)
    data = with_data(load.load_recipe("pretrain_7b", scale="laptop"), make=make).data
    own = {key: getattr(data, key) for key in ("mix", "sources", "tokenizer", "prepared")}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=own)})
    if recipe.continual is not None and recipe.continual.base_data is None:
        recipe = recipe.model_copy(update={"continual": recipe.continual.model_copy(update={"base_data": "mix"})})
    return _with_domains(recipe, say=make)


def _base_folder() -> Path:
    return cache_dir() / "models" / "pretrain_7b-laptop-half"


def _is_ours(recipe: Recipe) -> bool:
    return recipe.base_model == str(_base_folder())


def _needs_tasks(recipe: Recipe) -> bool:
    """Whether a recipe without sources learns conversations or pairs; adapters without a word of data do too."""
    return not recipe.data.sources and (recipe.form != "text" or recipe.lora is not None)


def _with_tasks(recipe: Recipe, *, make: bool) -> Recipe:
    """The recipe with conversations or pairs from Python's own library, in the base model's tokens."""
    form = "instructions" if recipe.form == "text" else recipe.form
    section = recipe.sft or recipe.dpo
    name = section.data if section is not None and section.data else form
    corpus = with_data(load.load_recipe("pretrain_7b", scale="laptop"), make=make).data
    root = Path(corpus.prepared or "").parent / "tasks"
    file = root / f"{form}.jsonl"
    own = {
        "format": form,
        "sources": {name: str(file)},
        "tokenizer": corpus.tokenizer,
        "prepared": str(root / f"prepared_{form}"),
        "chat_template": recipe.data.chat_template or "plain",
        "too_long": "skip",
    }
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=own)})
    if make:
        if not file.is_file():
            _say(f"no data.sources given: writing {form.replace('_', ' ')} from Python's own library to {file} (once)")
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    changes = [f"training.total_steps={BASE_STEPS}", "checkpoint.every_steps=0", "evaluation.every_steps=0"]
    changes += [f"model.{key}={size}" for key, size in BASE_SHAPE.items()]
    with tempfile.TemporaryDirectory(dir=folder.parent) as run:
        words = ["train", "pretrain_7b", "--scale", "laptop", "--nproc", str(num_ranks), "--run", run]
        words += [word for change in changes for word in ("--set", change)]
        if subprocess.run([sys.executable, "-m", "igla_mega", *words]).returncode:
            raise ConfigError("base_model: recipe 1 at laptop scale did not train; why is said above.")
        (Path(run) / "checkpoints" / f"step_{BASE_STEPS:08d}").rename(folder)


def _with_domains(recipe: Recipe, *, say: bool) -> Recipe:
    """Give phases whose names are no sources one each of `DOMAINS`."""
    if recipe.curriculum is None:
        return recipe
    known = {"mix", *recipe.data.sources}
    unknown = [phase for phase in recipe.curriculum.phases if phase.data is None and phase.name not in known]
    domains = {phase.name: DOMAINS[i % len(DOMAINS)] for i, phase in enumerate(unknown)}
    if domains and say:
        _say("no data.sources given: " + ", ".join(f"{name} is {source}" for name, source in domains.items()))
    phases = tuple(
        phase.model_copy(update={"data": domains[phase.name]}) if phase.name in domains else phase
        for phase in recipe.curriculum.phases
    )
    return recipe.model_copy(update={"curriculum": recipe.curriculum.model_copy(update={"phases": phases})})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
