"""What verbs of the command line share: looking at a path, choosing ranks, printing what comes next."""

import difflib
import importlib.metadata
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igla_mega.config.errors import ConfigError


def version() -> str:
    """Return the version of the installed package."""
    try:
        return importlib.metadata.version("igla-mega")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def made(path: object, *then: str) -> None:
    """Print the path of what a verb made, and the commands that usually come next; once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"made: {path}", *(f"next: {command}" for command in then), sep="\n", flush=True)


def trained(run: Path, code: int) -> None:
    """Print the folder of a complete run, else its newest checkpoint and the command that resumes it."""
    from igla_mega.checkpoint import integrity

    if not code:
        made(run, *(f"igla-mega {verb} {quoted(run)}" for verb in ("report", "eval")))
        return
    steps = integrity.steps_in(run / "checkpoints")
    made(integrity.step_dir(run / "checkpoints", steps[-1]) if steps else run, f"igla-mega {shlex.join(sys.argv[1:])}")


def quoted(path: object) -> str:
    """Return a path as a word of a shell command."""
    return shlex.quote(str(path))


def refuse_absent(path: Path, what: str = "a checkpoint (step_00000100), or the run folder that contains it") -> None:
    """Raise ConfigError for a local path without a folder, before anything slow is imported."""
    address = "://" in str(path) or str(path).split(":/", 1)[0] in (
        "s3",
        "gs",
        "gcs",
        "http",
        "https",
        "file",
        "memory",
    )
    if not address and not path.is_dir():
        problem = "not a folder" if path.exists() else "no such folder"
        raise ConfigError(f"{path}: {problem}.\n  Give {what}.")


def check_place(place: str) -> bool:
    """Check checkpoints or a prepared dataset, and print the result; False if the place may be a recipe.

    Raises:
        ConfigError: something is damaged, or there is nothing of that name.
    """
    if "://" in place or (Path(place).is_dir() and not Path(f"{place}.manifest.json").is_file()):
        _check_checkpoints(place)
        return True
    if Path(f"{place}.manifest.json").is_file():
        from igla_mega.prepare.manifest import damage

        if breaches := damage(place, whole=True):
            raise ConfigError(*breaches)
        print(f"{place}: every byte is the one that was written")
        return True
    from igla_mega.config import load

    if not Path(place).exists() and place not in load.packaged():
        near = difflib.get_close_matches(place, load.packaged(), n=1)
        hint = f"; did you mean the packaged recipe `{near[0]}`?" if near else ", and no packaged recipe of this name."
        raise ConfigError(
            f"{place}: no such file or folder{hint}\n  Give a recipe (its path, or {', '.join(load.packaged())}), a "
            "run folder, a checkpoint, or a prepared dataset without .bin."
        )
    return False


def _check_checkpoints(place: str) -> None:
    """Verify every checkpoint of a run folder, a checkpoint folder or a remote address, and print the result."""
    if "://" in place:
        from igla_mega.checkpoint import remote

        lines, damages = remote.report(place)
    else:
        from igla_mega.checkpoint import integrity

        lines, damages = integrity.report(Path(place))
    for line in lines:
        print(line)
    if damages:
        whole = any("every file has the size and digest" in line for line in lines)
        way_out = (
            "A resume passes over what is damaged and takes the newest whole checkpoint: nothing to do, unless one is "
            "needed for itself."
            if whole
            else "A resume passes it over. With no whole checkpoint left in its run folder: restore one from a backup, "
            "or start in a new run folder."
        )
        raise ConfigError(*damages, f"  {way_out}")


def export(checkpoint: Path, hf_dir: Path, *, adapter_only: bool, merge: bool) -> None:
    """Turn a checkpoint into a Hugging Face folder: a whole model, adapters alone, or adapters merged into their base.

    Raises:
        ConfigError: the options do not suit the checkpoint.
    """
    from igla_mega.checkpoint import adapters, hugging_face
    from igla_mega.checkpoint.folder import read_recipe, resolve_checkpoint
    from igla_mega.checkpoint.safetensors import refuse_existing

    refuse_existing(hf_dir)
    checkpoint = resolve_checkpoint(checkpoint)
    has_adapters = read_recipe(checkpoint).lora is not None
    if has_adapters and adapter_only == merge:
        raise ConfigError(
            f"{checkpoint}: holds adapters.\n  Export them with --adapter-only, or with their base: --merge."
        )
    if (adapter_only or merge) and not has_adapters:
        raise ConfigError(
            f"{checkpoint}: holds no adapters but a whole model.\n  Leave --adapter-only and --merge out."
        )
    if adapter_only:
        adapters.export_adapters(checkpoint, hf_dir)
    elif merge:
        hf_dir.resolve().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=hf_dir.resolve().parent) as unfinished:
            merged = Path(unfinished, "merged")
            adapters.merge_adapters(checkpoint, merged)
            hugging_face.export_folder(merged, hf_dir, tuned=checkpoint, say=print)
    else:
        hugging_face.export_folder(checkpoint, hf_dir, say=print)
    if not adapter_only:
        hugging_face.print_logit_difference(checkpoint, hf_dir)
    opener = "peft import AutoPeftModelForCausalLM" if adapter_only else "transformers import AutoModelForCausalLM"
    made(hf_dir, f"python -c {quoted(f'from {opener} as Model; print(Model.from_pretrained({str(hf_dir)!r}))')}")


def continue_text(checkpoint: Path, prompt: str, **how: Any) -> None:
    """Print a prompt with its continuation, and a note if that is blank.

    Args:
        how: as for `evaluate.generate.generate`.
    """
    from igla_mega.evaluate.generate import generate

    pieces: list[str] = []

    def show(text: str) -> None:
        # The prompt only with the first text: an error comes before it.
        print(text if pieces else prompt + text, end="", flush=True)
        pieces.append(text)

    generate(checkpoint, prompt, **how, stream=show)
    print("" if pieces else prompt, flush=True)
    if not "".join(pieces).strip():
        what = "white space alone" if pieces else "the end of the text at once"
        other = "another prompt" if how["temperature"] else "--temperature 0.8, or another prompt"
        print(f"note: the model answered with {what}. Try {other}, or train it longer.", file=sys.stderr)


def print_scores(
    checkpoint: Path, sources: Mapping[str, tuple[float, float, int]], tasks: Mapping[str, float], *, as_json: bool
) -> None:
    """Print what `eval` measured: loss, perplexity and number of tokens of sources, and scores of tasks."""
    if as_json:
        named = {
            name: {"loss": loss, "perplexity": perplexity if math.isfinite(perplexity) else None, "tokens": count}
            for name, (loss, perplexity, count) in sources.items()
        }
        print(json.dumps({"checkpoint": str(checkpoint), "sources": named, "tasks": tasks}))
        return
    if sources:
        print(f"{'source':16} {'nats/token':>10} {'perplexity':>10} {'tokens':>12}")
    for name, (loss, perplexity, count) in sources.items():
        print(f"{name:16} {loss:10.4f} {perplexity:10.2f} {count:12,}")
    for name, value in tasks.items():
        print(f"{name:40} {value:10.4f}")


def under_launcher() -> bool:
    """Return True if this process is a rank that torchrun or Slurm has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks(nproc: int | None, nnodes: str, rendezvous: str | None) -> tuple[int, tuple[int, int]]:
    """Return the ranks of this machine and the numbers of nodes; those of the launcher, if there is one."""
    from igla_mega.layout.hardware import num_local_gpus

    if under_launcher():
        return int(os.environ["WORLD_SIZE"]), (1, 1)
    nodes = _nodes(nnodes)
    if nodes[1] > 1 and rendezvous is None:
        raise ConfigError(
            f"--rendezvous: {nnodes} nodes need an address to meet at.\n"
            "  Give HOST:PORT of one of them, such as node1:29500."
        )
    return nproc or num_local_gpus() or 1, nodes


def _nodes(text: str) -> tuple[int, int]:
    """Parse `2` or `1:4`; return minimum and maximum."""
    parts = text.split(":")
    fewest, most = (int(part) if part.isdecimal() and len(part) < 7 else 0 for part in (parts[0], parts[-1]))
    if len(parts) > 2 or not 1 <= fewest <= most:
        raise ConfigError(f"--nnodes: {text} is neither a number of nodes nor MIN:MAX.\n  Use 2 or 1:4.")
    return fewest, most


def exit_on_signals() -> None:
    """Exit with the requeue code on a scheduler's signal, until ranks handle signals themselves."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(75))


def quiet_libraries() -> None:
    """Hide warnings of pinned libraries that a user cannot act on."""
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed)(\.|$)")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
