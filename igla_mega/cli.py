"""The command line: parses, calls, prints.

Verbs import what they need when they run, so that `--help`, `check`, `recipes` and `plan` start without torch.
"""

import importlib.util
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from igla_mega.config.errors import ConfigError
from igla_mega.config.names import printable
from igla_mega.distributed import environment

app = typer.Typer(
    help="Train Llama-style language models on megatron-core, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_DATA_CHECKED = "IGLA_DATA_CHECKED"
"""Environment variable set for the ranks that this process starts: their data has been checked."""

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a packaged recipe, or a path.")]
Scale = Annotated[str | None, typer.Option(help="Overlay of smaller sizes: `laptop`.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Set a key of the recipe; may be repeated.")
]
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A run folder, or one of its checkpoints.")]
Nproc = Annotated[int | None, typer.Option(min=1, help="Ranks on this machine. Default: its number of GPUs, or 1.")]
Models = Annotated[Path | None, typer.Option(envvar="IGLA_MODELS", help="Folder of base models.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run a verb: an invalid input is a message and exit code 2, a failure of the machine a message and 1."""
    try:
        environment.end_with_launcher()
        environment.adopt()
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 130
    except ConfigError as error:
        code = _fail(error, 2)
    except (RuntimeError, FloatingPointError, OSError) as error:
        if os.environ.get("IGLA_TRACEBACK"):
            raise
        code = _fail(error, 1)
    except MemoryError as error:
        code = _fail(f"out of memory: a file or a recipe needs more than this machine has. {error}".rstrip(), 1)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer raises these for an invalid option or argument
            raise
        code = _fail(error.format_message(), 2)
    # Not sys.exit: destructors of process groups would wait for peers that this rank has left behind.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _fail(error: object, code: int) -> int:
    """Print an error, once for all ranks where they meet the same one; return the exit code."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # Usually every rank meets the same error and rank 0 prints it; torchrun then ends this one while it sleeps.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1.5)
    text = printable(str(error))
    if "onnection closed by peer" in text or "onnection reset by peer" in text:
        text = f"a peer of rank {rank} has ended; its error message names the cause"
    print(f"error: {text}" if rank == "0" else f"error on rank {rank}: {text}", file=sys.stderr, flush=True)
    return code


@app.command()
def recipes() -> None:
    """List the packaged recipes."""
    from igla_mega.config import load

    for name, line in load.packaged().items():
        print(f"{name:14} {line}")


@app.command()
def check(
    recipe: Recipe,
    scale: Scale = None,
    set_: Set = None,
    nproc: Annotated[int | None, typer.Option(help="Also check the layout for this number of ranks.")] = None,
) -> None:
    """Validate a recipe, a prepared dataset, a run's checkpoints, or one of them; print all errors at once."""
    if "://" in recipe or (Path(recipe).is_dir() and not Path(f"{recipe}.manifest.json").is_file()):
        _check_checkpoints(recipe)
        return
    if Path(f"{recipe}.manifest.json").is_file():
        from igla_mega.prepare.manifest import damage

        if breaches := damage(recipe, whole=True):
            raise ConfigError(*breaches)
        print(f"{recipe}: every byte is the one that was written")
        return
    from igla_mega.config import load, rules
    from igla_mega.data.blend import normalised

    loaded = load.load_recipe(recipe, scale=scale, overrides=set_)
    assumed: list[str] = []
    if nproc:
        from igla_mega.plan.resolve import resolve, shape_of_base

        base, assumed = shape_of_base(loaded)
        resolve(loaded, nproc, _device(), base=base)
    if absent := rules.not_installed(loaded):
        raise ConfigError(*absent)
    print(f"{loaded.name}: fine")
    notes = [*assumed, *rules.warnings(loaded), *rules.not_yet(loaded), *filter(None, [normalised(loaded.data.mix)])]
    for sentence in notes:
        print(f"  note: {sentence}")


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
        raise ConfigError(*damages, "  Use another checkpoint, or restore this one from a backup.")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A packaged recipe, a path, or a run folder.")],
    scale: Scale = None,
    set_: Set = None,
    gpu: Annotated[str | None, typer.Option(help="Hardware, such as a100-80gb or cpu. Default: the card's.")] = None,
    gpus: Annotated[str | None, typer.Option(help="Number of GPUs; 8,64,256 shows how the recipe scales.")] = None,
    price: Annotated[
        float | None, typer.Option(help="Dollars an hour of one GPU. Default: the hardware table's.")
    ] = None,
    hardware: Annotated[Path | None, typer.Option(help="YAML file that describes additional hardware.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Rates measured by `make gpu-check`.")] = None,
    models: Models = None,
    samples: Annotated[int | None, typer.Option(help="Rows per epoch, for a recipe that counts epochs.")] = None,
    out: Annotated[Path | None, typer.Option(help="With several --gpus: also write the plot as an HTML page.")] = None,
    json_: Json = False,
) -> None:
    """Forecast memory, time and cost of a recipe; for a run folder, compare the forecast with the run."""
    from igla_mega.plan.question import Asked, ask

    asked = ask(
        Asked(
            name=recipe,
            scale=scale,
            overrides=set_,
            gpu=gpu,
            gpus=gpus,
            price=price,
            hardware_file=hardware,
            calibration=calibration,
            models=models,
            samples=samples,
        )
    )
    if out is not None:
        if len(asked.table) < 2:
            raise ConfigError("--out: a plot needs several numbers of GPUs. Give --gpus 8,64,256.")
        from igla_mega.report.scaling import write_scaling

        write_scaling(asked.table, out)
    print(asked.json() if json_ else asked.text())


@app.command()
def prepare(
    recipe: Recipe,
    scale: Scale = None,
    set_: Set = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Prepare part I (from 0) of N of each source; then `merge`.")
    ] = None,
    engine: Annotated[str, typer.Option(help="`local`, or `ray`: spread the parts over a Ray cluster.")] = "local",
    on_error: Annotated[str | None, typer.Option(help="Records without text: `stop`, `skip`, `quarantine`.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Default: data.workers, or all cores.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be written and left out.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write a page on the prepared data: lengths, samples, duplicates.")
    ] = False,
) -> None:
    """Turn the raw text of a recipe's sources into indexed datasets; resumes after a kill."""
    from igla_mega.layout.stages import parts_of
    from igla_mega.prepare import laptop
    from igla_mega.prepare.samples import prepare_samples
    from igla_mega.prepare.sources import parse_part

    set_ = [*(set_ or []), *([f"data.on_error={on_error}"] if on_error else [])]
    loaded = _load(recipe, scale, set_)
    if scale == "laptop":
        loaded = laptop.with_base(laptop.with_data(loaded), None, num_ranks=1)
    part = parse_part(shard) if shard else (0, 1)
    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine: {engine} is neither `local` nor `ray`.")
    for stage in parts_of(loaded):
        if stage.form != "text" and (shard or engine == "ray" or dry_run or report):
            raise ConfigError(f"--shard, --engine, --dry-run, --report: for text; {stage.name} reads {stage.form}.")
    for stage in parts_of(loaded):
        if stage.form == "text":
            _prepare_text(stage, engine, workers, part, dry_run, report)
        else:
            prepare_samples(stage)


def _prepare_text(recipe, engine: str, workers: int | None, part: tuple[int, int], dry_run: bool, report: bool) -> None:
    """Prepare the text sources of one part of a recipe."""
    from igla_mega.data.blend import normalised
    from igla_mega.prepare.sources import prepare_sources

    if note := normalised(recipe.data.mix):
        print(note)
    if engine == "ray":
        from igla_mega.prepare.ray import prepare_on_ray

        prepare_on_ray(recipe.data, workers=workers)
    else:
        prepare_sources(recipe.data, workers=workers, part=part, dry_run=dry_run)
    if report and not dry_run and part[1] == 1:
        from igla_mega.prepare.report import write_report

        print(write_report(recipe.data, recipe.sequence_length or 8192))


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Dataset to write, as a path without .bin and .idx.")],
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="Datasets to join, in order.")],
    reference: Annotated[bool, typer.Option("--reference", help="Refer to the parts instead of copying them.")] = False,
) -> None:
    """Join indexed datasets into one."""
    from igla_mega.prepare.merge import merge as join

    join(
        out,
        [str(part).removesuffix(".idx").removesuffix(".bin") for part in parts],
        "reference" if reference else "copy",
    )


@app.command()
def train(
    recipe: Recipe,
    scale: Scale = None,
    set_: Set = None,
    nproc: Nproc = None,
    run: Annotated[Path | None, typer.Option(help="Run folder; resumed if it has a checkpoint.")] = None,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Save and stop at this step.")] = None,
    models: Models = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print the cost of context parallelism at the start.")
    ] = False,
    nnodes: Annotated[
        str,
        typer.Option(
            metavar="N|MIN:MAX",
            envvar="PET_NNODES",
            help="Number of machines; run the same command on each. MIN:MAX allows fewer.",
        ),
    ] = "1",
    rendezvous: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            envvar="PET_RDZV_ENDPOINT",
            help="Where machines meet; HOST is one of them.",
        ),
    ] = None,
    restarts: Annotated[int, typer.Option(min=0, help="How often ranks are restarted after a failure.")] = 0,
    accept_changes: Annotated[
        str, typer.Option(metavar="KEY,...", help="Resume although these keys, or the data, make it another run.")
    ] = "",
) -> None:
    """Train a recipe: as one rank under torchrun or Slurm, else starting the ranks of this machine.

    SIGTERM, SIGUSR1 and SIGUSR2 finish the step, save and exit with code 75 (requeue: the same command resumes); so
    does Ctrl-C, with 130; a second signal exits at once. Code 76: the run was stuck (distributed.hang_seconds). Code 2:
    the recipe or the command is invalid. Code 1: a failure.
    """
    from igla_mega.config import rules
    from igla_mega.prepare import laptop

    _exit_on_signals()
    loaded = _load(recipe, scale, set_)
    if refusals := [*rules.not_yet(loaded), *rules.not_installed(loaded)]:
        raise ConfigError(*refusals)
    run = run or Path("runs") / (f"{loaded.name}-{scale}" if scale else loaded.name)
    if scale == "laptop":
        # Written once, by the process that starts the ranks.
        make = not _under_launcher() or os.environ["RANK"] == "0"
        loaded = laptop.with_base(laptop.with_data(loaded, make=make), models, num_ranks=nproc or 1, make=make)
    if not _under_launcher():
        from igla_mega.layout.hardware import num_local_gpus

        nproc, nodes = nproc or num_local_gpus() or 1, _nodes(nnodes)
        if nodes[1] > 1 and rendezvous is None:
            raise ConfigError(
                f"--rendezvous: {nnodes} nodes need an address to meet at.\n"
                "  Give HOST:PORT of one of them, such as node1:29500."
            )
        _check_before_launch(loaded, nproc * nodes[1], models)
        os.environ[_DATA_CHECKED] = "1"
        if nproc > 1 or nodes[1] > 1 or restarts:
            _quiet_libraries()
            from igla_mega.distributed.torchrun import torchrun
            from igla_mega.train.ends import Launched

            ended = Launched(run, loaded.logging)
            raise typer.Exit(
                torchrun(nproc, nodes=nodes, rendezvous=rendezvous, restarts=restarts, run_dir=run, ended=ended)
            )
    elif os.environ["RANK"] == "0" and _DATA_CHECKED not in os.environ and loaded.model is not None:
        _check_data(loaded, int(os.environ["WORLD_SIZE"]))
    _quiet_libraries()
    from igla_mega import run as engine

    accepted = [key.strip() for key in accept_changes.split(",") if key.strip()]
    raise typer.Exit(
        engine.train(loaded, run, stop_after=stop_after, models=models, verbose=verbose, accepted=accepted)
    )


@app.command()
def fisher(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: `fisher` beside CKPT.")] = None,
    scale: Scale = None,
    set_: Set = None,
    nproc: Nproc = None,
) -> None:
    """Estimate and save the Fisher and anchor of a finished model, on a recipe's data."""
    _quiet_libraries()
    from igla_mega.prepare import laptop

    loaded = _load(recipe, scale, set_)
    if scale == "laptop":
        from igla_mega.checkpoint.folder import read_recipe, resolve_checkpoint

        model = read_recipe(resolve_checkpoint(checkpoint)).model
        make = not _under_launcher() or os.environ["RANK"] == "0"
        loaded = laptop.with_data(loaded.with_keys({"model": model}), make=make)
    if not _under_launcher():
        from igla_mega.layout.hardware import num_local_gpus

        nproc = nproc or num_local_gpus() or 1
        if nproc > 1:
            from igla_mega.distributed.torchrun import torchrun

            raise typer.Exit(torchrun(nproc))
    from igla_mega import run as engine

    folder = checkpoint.parent if (checkpoint / "manifest.json").is_file() else checkpoint
    engine.take_fisher(checkpoint, loaded, out or folder / "fisher")


@app.command(name="import")
def import_(
    hf_dir: Path,
    checkpoint: Path,
    base: Annotated[Path | None, typer.Option(help="Of a folder of PEFT's: its base, as a checkpoint.")] = None,
    upcycle: Annotated[
        int | None, typer.Option(min=1, help="Make a mixture of so many experts of a dense model, equal to it.")
    ] = None,
    experts_per_token: Annotated[int, typer.Option(min=1, help="That a token visits, with --upcycle.")] = 2,
) -> None:
    """Turn a Hugging Face folder, or one of PEFT's, into a checkpoint (CPU only, one tensor at a time)."""
    _quiet_libraries()
    from igla_mega.checkpoint import adapters, hugging_face

    if (hf_dir / adapters.CONFIG).is_file():
        if base is None:
            raise ConfigError(f"{hf_dir}: adapters of a base that is not given.\n  Add --base CKPT.")
        from igla_mega.checkpoint.folder import resolve_checkpoint

        adapters.import_adapters(hf_dir, resolve_checkpoint(base), checkpoint)
        return
    moe = None
    if upcycle is not None:
        from igla_mega.config.features import Moe

        moe = Moe(num_experts=upcycle, num_experts_per_tok=experts_per_token)
    hugging_face.import_folder(hf_dir, checkpoint, say=print, upcycle=moe)
    hugging_face.print_logit_difference(checkpoint, hf_dir)


@app.command()
def export(
    checkpoint: Checkpoint,
    hf_dir: Path,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="The adapters alone, as PEFT saves them.")
    ] = False,
    merge: Annotated[bool, typer.Option("--merge", help="The base with its adapters merged into it.")] = False,
) -> None:
    """Turn a checkpoint into a Hugging Face folder (CPU only, one tensor at a time)."""
    _quiet_libraries()
    from igla_mega.checkpoint import adapters, hugging_face
    from igla_mega.checkpoint.folder import read_recipe, resolve_checkpoint

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
        return
    if merge:
        import tempfile

        with tempfile.TemporaryDirectory(dir=hf_dir.resolve().parent) as unfinished:
            merged = Path(unfinished, "merged")
            adapters.merge_adapters(checkpoint, merged)
            hugging_face.export_folder(merged, hf_dir, say=print)
        hugging_face.print_logit_difference(checkpoint, hf_dir)
        return
    hugging_face.export_folder(checkpoint, hf_dir, say=print)
    hugging_face.print_logit_difference(checkpoint, hf_dir)


@app.command(name="eval")
def eval_(
    checkpoint: Checkpoint,
    data: Annotated[list[Path] | None, typer.Option(help="Indexed dataset, without .bin; may be repeated.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-evaluation-harness, in place of the sources.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of the tasks' YAML files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task. Default: all.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks on this machine, for --tasks. Default: 1.")] = None,
    json_: Json = False,
) -> None:
    """Print loss and perplexity for each source: the held-out part of the run's own, or whole datasets; or tasks."""
    _quiet_libraries()
    if tasks is None:
        given = {"--include-path": include_path, "--limit": limit, "--num-fewshot": num_fewshot, "--nproc": nproc}
        if others := [option for option, value in given.items() if value is not None]:
            raise ConfigError(f"{', '.join(others)}: only with --tasks, and none are given. Name them.")
    elif data and (nproc or int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError("--data: is measured in one process. Leave --nproc out, or ask for --tasks alone.")
    elif (nproc or 1) > 1 and "RANK" not in os.environ:
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError("--tasks: lm-evaluation-harness is not installed.\n  pip install 'igla-mega[eval]'")
        from igla_mega.distributed.torchrun import torchrun

        raise typer.Exit(torchrun(nproc or 1))
    from igla_mega.evaluate import checkpoint as measure

    sources, scores = {}, {}
    if tasks is not None:
        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        if not names:
            raise ConfigError("--tasks: names no task. Give NAME or NAME,NAME.")
        from igla_mega.config.schema import Tasks
        from igla_mega.plan.choose import choose_layout

        folder = str(include_path) if include_path else None
        asked = Tasks(names=names, include_path=folder, limit=limit, num_fewshot=num_fewshot)
        scores = measure.evaluate_tasks(checkpoint, asked, choose_layout)
        if os.environ.get("RANK", "0") != "0":
            return
    if tasks is None or data:
        sources = measure.evaluate(checkpoint, {path.name: str(path) for path in data} if data else None)
    if json_:
        import json

        named = {
            name: {"loss": loss, "perplexity": perplexity if math.isfinite(perplexity) else None, "tokens": count}
            for name, (loss, perplexity, count) in sources.items()
        }
        print(json.dumps({"checkpoint": str(checkpoint), "sources": named, "tasks": scores}))
        return
    if sources:
        print(f"{'source':16} {'nats/token':>10} {'perplexity':>10} {'tokens':>12}")
    for name, (loss, perplexity, count) in sources.items():
        print(f"{name:16} {loss:10.4f} {perplexity:10.2f} {count:12,}")
    for name, value in scores.items():
        print(f"{name:40} {value:10.4f}")


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: no limit.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Continue a text."""
    _quiet_libraries()
    from igla_mega.evaluate.generate import generate as continue_text

    print(prompt, end="", flush=True)
    continue_text(
        checkpoint,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stream=lambda text: print(text, end="", flush=True),
    )
    print()


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    others: Annotated[
        list[Path] | None, typer.Argument(metavar="[OTHER_RUN...]", help="Runs to set beside it.")
    ] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(metavar="OTHER_RUN...", help="The same: runs to set beside it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: RUN/report.html.")] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page; it follows a run that is still training.")
    ] = False,
    host: Annotated[str, typer.Option(help="With --serve: the address that answers.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve; 0 takes a free one.")] = 8400,
) -> None:
    """Write RUN/report.html: the run on one page, beside others if asked; or serve it, live."""
    beside = [*(compare or []), *(others or [])]
    if serve:
        from igla_mega.report.serve import serve as serve_page

        if out is not None:
            raise ConfigError("--out: a file is written, or the page is served. Leave out --out or --serve.")
        serve_page([run, *beside], host, port)
        return
    from igla_mega.report.page import write_report

    print(write_report(run, beside, out))


@app.command()
def doctor(
    list_: Annotated[bool, typer.Option("--list", help="Only list what is installed; measure nothing.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Measure for half a minute, so that heat and full caches show.")
    ] = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine. Default: its number of GPUs, or 1.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Folder that the run will write. Default: runs.")] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", envvar="IGLA_LIMITS", help="Rate that a node must reach; may be repeated."),
    ] = None,
    json_: Json = False,
) -> None:
    """List what is installed and what its absence costs, then test this node, or all nodes under a launcher.

    Exit code 1: a node is bad; it is named. Code 2: an invalid option.
    """
    _quiet_libraries()
    from igla_mega.layout.hardware import num_local_gpus

    gpus = 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else num_local_gpus()
    from igla_mega.doctor import node_test

    limits = node_test.parse_limits(limit or [], on_cpu=not gpus)
    nproc = nproc or gpus or 1
    if not list_ and not _under_launcher() and nproc > 1:
        from igla_mega.distributed.torchrun import torchrun

        raise typer.Exit(torchrun(nproc))
    from igla_mega.doctor.examine import Examination, examine

    asked = Examination(limits, run or Path("runs"), load=not list_, full=full, as_json=json_)
    raise typer.Exit(0 if examine(asked) else 1)


def _under_launcher() -> bool:
    """Return True if this process is a rank that torchrun or Slurm has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _exit_on_signals() -> None:
    """Exit with the requeue code on a scheduler's signal, until ranks handle signals themselves."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(75))


def _load(recipe: str, scale: str | None, overrides: list[str] | None):
    from igla_mega.config import load

    return load.load_recipe(recipe, scale=scale, overrides=overrides)


def _device() -> str:
    from igla_mega.layout.hardware import num_local_gpus

    return "cuda" if num_local_gpus() else "cpu"


def _nodes(text: str) -> tuple[int, int]:
    """Parse `2` or `1:4`; return minimum and maximum."""
    parts = text.split(":")
    fewest, most = (int(part) if part.isdigit() else 0 for part in (parts[0], parts[-1]))
    if len(parts) > 2 or not 1 <= fewest <= most:
        raise ConfigError(f"--nnodes: {text} is neither a number of nodes nor MIN:MAX.\n  Use 2 or 1:4.")
    return fewest, most


def _check_before_launch(recipe, num_ranks: int, models: Path | None) -> None:
    """Find invalid inputs within a second, before ranks import torch."""
    from igla_mega.config.load import base_folder

    first = recipe.stages[0] if recipe.stages else recipe
    if first.base_model:
        base_folder(first.base_model, models)
    if recipe.model is not None:  # else the layout depends on the base model, which ranks read
        _check_data(recipe, num_ranks)


def _check_data(recipe, num_ranks: int) -> None:
    """Check the prepared data, and the layout on the way."""
    from igla_mega.plan.resolve import resolve
    from igla_mega.prepare.check import check_prepared

    check_prepared(recipe, resolve(recipe, num_ranks, _device()).layouts[0])


def _quiet_libraries() -> None:
    """Hide warnings of pinned libraries that a user cannot act on."""
    import warnings

    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed)(\.|$)")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
