"""The command line: parses, calls, prints.

Verbs import what they need when they run, so that `--help`, `check`, `recipes` and `plan` start without torch.
"""

import contextlib
import importlib.util
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from igla_mega import verbs
from igla_mega.config.errors import ConfigError
from igla_mega.config.names import printable
from igla_mega.distributed import environment
from igla_mega.os_errors import words_of

app = typer.Typer(
    help="Train Llama-style language models on megatron-core, from a laptop to a cluster.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_DATA_CHECKED = "IGLA_DATA_CHECKED"
"""Environment variable set for the ranks that this process starts: their data has been checked."""


def _packaged(incomplete: str) -> list[str]:
    """Return the packaged recipes that a word of the command line may become."""
    from igla_mega.config import load

    return [name for name in load.packaged() if name.startswith(incomplete)]


Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a packaged recipe, or a path.", autocompletion=_packaged)
]
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
        words = words_of(error)
        code = _fail(error if words is None else words, 1)
    except MemoryError as error:
        code = _fail(f"out of memory: a file or a recipe needs more than this machine has. {error}".rstrip(), 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer raises these for an invalid option or argument
            code = _fail(error.format_message(), 2)
        elif (words := words_of(error)) is not None and not os.environ.get("IGLA_TRACEBACK"):
            code = _fail(words, 1)
        else:
            raise
    # Not sys.exit: destructors of process groups would wait for peers that this rank has left behind.
    try:
        sys.stdout.flush()
    except OSError as error:
        # Of a closed pipe, such as that of `| head`, there is nothing to tell.
        code = code or _fail("" if isinstance(error, BrokenPipeError) else f"standard output: {error.strerror}", 1)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code or 0)


def _fail(error: object, code: int) -> int:
    """Print an error, unless it is empty, once for all ranks where they meet the same one; return the exit code."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # Usually every rank meets the same error and rank 0 prints it; torchrun then ends this one while it sleeps.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1.5)
    text = printable(str(error))
    if not text:
        return code
    if "onnection closed by peer" in text or "onnection reset by peer" in text:
        text = f"a peer of rank {rank} has ended; its error message names the cause"
    print(f"error: {text}" if rank == "0" else f"error on rank {rank}: {text}", file=sys.stderr, flush=True)
    return code


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"igla-mega {verbs.version()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


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
    if verbs.check_place(recipe):
        return
    from igla_mega.config import rules
    from igla_mega.config.rules_experts import differs_by_layout
    from igla_mega.data.blend import normalised
    from igla_mega.data.prepared import refuse_other_bos
    from igla_mega.layout.stages import parts_of
    from igla_mega.plan.refusals import refusals
    from igla_mega.plan.resolve import resolve, shape_of_base, with_shape

    loaded = _load(recipe, scale, set_)
    if found := refusals(loaded):
        raise ConfigError(*found)
    base, assumed = shape_of_base(loaded)
    if nproc:
        loaded = resolve(loaded, nproc, _device(), base=base).recipe
    elif base is not None and not assumed:
        loaded = with_shape(loaded, base)
        rules.check(loaded)
    for part in parts_of(loaded):
        refuse_other_bos(part)
    print(f"{loaded.name}: fine")
    notes = [*(assumed if nproc else []), *rules.warnings(loaded)]
    notes += [line for part in loaded.stages or [loaded] for line in differs_by_layout(part)]
    notes += filter(None, [normalised(loaded.data.mix)])
    if scale != "laptop" and not all(part.data.sources for part in parts_of(loaded)):
        notes.append("data.sources: not set; `train` needs them, or --scale laptop, which makes data of its own")
    for sentence in notes:
        print(f"  note: {sentence}")


@app.command()
def explain(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="Such as `training.learning_rate`, or a section.")
    ] = None,
) -> None:
    """Print what a key of a recipe is: meaning, range, default, what a change does to a resumed run, what reads it."""
    from igla_mega.guide.explain import explain as text_about

    print(text_about(key))


@app.command()
def init(
    data: Annotated[Path | None, typer.Option(help="A file of data, or a folder of them.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Model to start from; to pretrain, one to take the shape of.")
    ] = None,
    goal: Annotated[str | None, typer.Option(help="`pretrain`, `continue`, `sft`, `lora` or `dpo`.")] = None,
    out: Annotated[Path | None, typer.Option(help="Recipe to write. Default: GOAL.yaml.")] = None,
    models: Models = None,
) -> None:
    """Write a recipe for data of your own, with what the files show; asks for what is not given, on a terminal."""
    from igla_mega.guide.suggest import GOALS, suggest
    from igla_mega.layout.hardware import num_local_gpus

    if sys.stdin.isatty() and sys.stdout.isatty():
        data = data or Path(typer.prompt("Data (a file or a folder)"))
        goal = goal or typer.prompt(f"Goal ({', '.join(GOALS)})", default="continue")
        none = "" if goal == "pretrain" else None
        base = base or typer.prompt("Base model (a folder)", default=none, show_default=False) or None
    if data is None or goal is None:
        missing = [option for option, value in (("--data", data), ("--goal", goal)) if value is None]
        raise ConfigError(
            f"{', '.join(missing)}: not given.\n  Use --data FOLDER --base MODEL --goal {'|'.join(GOALS)}."
        )
    out = out or Path(f"{goal}.yaml")
    print(suggest(data, base, goal, out, ranks=num_local_gpus() or 1, models=models))
    word = verbs.quoted(out)
    verbs.made(out, *(f"igla-mega {verb} {word}" for verb in ("check", "prepare", "train")))


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
    if out is not None and not json_:
        verbs.made(out)


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
    part = parse_part(shard) if shard else (0, 1)
    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine: {engine} is neither `local` nor `ray`.")
    if scale == "laptop":
        loaded = laptop.supplied(loaded, None, num_ranks=1)
    for stage in parts_of(loaded):
        if stage.form != "text" and (shard or engine == "ray" or dry_run or report):
            raise ConfigError(f"--shard, --engine, --dry-run, --report: for text; {stage.name} reads {stage.form}.")
    for stage in parts_of(loaded):
        if stage.form == "text":
            _prepare_text(stage, engine, workers, part, dry_run, report)
        else:
            prepare_samples(stage)
    if not dry_run:
        options = [*(["--scale", scale] if scale else []), *(word for one in set_ for word in ("--set", one))]
        again = " ".join(map(verbs.quoted, [recipe, *options]))
        folders = dict.fromkeys(stage.data.prepared or "datasets in place" for stage in parts_of(loaded))
        verbs.made(", ".join(folders), f"igla-mega train {again}" if part[1] == 1 else "igla-mega merge OUT PART...")


def _prepare_text(recipe, engine: str, workers: int | None, part: tuple[int, int], dry_run: bool, report: bool) -> None:
    """Prepare the text sources of one part of a recipe."""
    from igla_mega.data.blend import normalised
    from igla_mega.layout.stages import drawn_data
    from igla_mega.prepare.sources import prepare_sources

    data = drawn_data(recipe)
    if note := normalised(recipe.data.mix):
        print(note)
    if engine == "ray":
        from igla_mega.prepare.ray import prepare_on_ray

        prepare_on_ray(data, workers=workers)
    else:
        prepare_sources(data, workers=workers, part=part, dry_run=dry_run)
    if report and not dry_run and part[1] == 1:
        from igla_mega.prepare.report import write_report

        print(write_report(data, recipe.sequence_length or 8192))


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
    verbs.made(f"{out}.bin" if not reference else out)


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
    from igla_mega.plan.refusals import refusals
    from igla_mega.prepare import laptop
    from igla_mega.train.continuity import refuse_unknown_keys
    from igla_mega.train.run_folder import refuse_other_recipe

    verbs.exit_on_signals()
    loaded = _load(recipe, scale, set_)
    accepted = [key.strip() for key in accept_changes.split(",") if key.strip()]
    refuse_unknown_keys(accepted)
    if found := refusals(loaded):
        raise ConfigError(*found)
    run = run or Path("runs") / (f"{loaded.name}-{scale}" if scale else loaded.name)
    asked, (nproc, nodes) = nproc or 1, verbs.ranks(nproc, nnodes, rendezvous)
    # Written once, by the process that starts the ranks.
    make = not verbs.under_launcher() or os.environ["RANK"] == "0"
    if make:
        refuse_other_recipe(run, loaded)
    if scale == "laptop":
        if make:
            _refuse_before_making(loaded, models, nproc * nodes[1])
        loaded = laptop.supplied(loaded, models, num_ranks=asked, make=make)
    if not verbs.under_launcher():
        _check_before_launch(loaded, nproc * nodes[1], models)
        os.environ[_DATA_CHECKED] = "1"
        if nproc > 1 or nodes[1] > 1 or restarts:
            verbs.quiet_libraries()
            from igla_mega.distributed.torchrun import torchrun
            from igla_mega.train.ends import Launched

            ended = Launched(run, loaded.logging)
            raise typer.Exit(
                torchrun(nproc, nodes=nodes, rendezvous=rendezvous, restarts=restarts, run_dir=run, ended=ended)
            )
    elif os.environ["RANK"] == "0" and _DATA_CHECKED not in os.environ:
        _check_before_launch(loaded, int(os.environ["WORLD_SIZE"]), models)
    verbs.quiet_libraries()
    from igla_mega import run as engine

    code = engine.train(loaded, run, stop_after=stop_after, models=models, verbose=verbose, accepted=accepted)
    verbs.trained(run, code)
    raise typer.Exit(code)


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
    verbs.refuse_absent(checkpoint)
    verbs.quiet_libraries()
    from igla_mega.prepare import laptop

    loaded = _load(recipe, scale, set_)
    if scale == "laptop":
        from igla_mega.checkpoint.folder import read_recipe, resolve_checkpoint

        model = read_recipe(resolve_checkpoint(checkpoint)).model
        make = not verbs.under_launcher() or os.environ["RANK"] == "0"
        loaded = laptop.with_data(loaded.with_keys({"model": model}), make=make)
    if not verbs.under_launcher():
        from igla_mega.layout.hardware import num_local_gpus

        nproc = nproc or num_local_gpus() or 1
        if nproc > 1:
            from igla_mega.distributed.torchrun import torchrun

            raise typer.Exit(torchrun(nproc))
    from igla_mega import run as engine

    folder = checkpoint.parent if (checkpoint / "manifest.json").is_file() else checkpoint
    out = out or folder / "fisher"
    engine.take_fisher(checkpoint, loaded, out)
    section = "koshey" if loaded.continual is None and loaded.koshey is not None else "continual"
    verbs.made(out, f"igla-mega train {verbs.quoted(recipe)} --set {verbs.quoted(f'{section}.fisher={out}')}")


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
    verbs.refuse_absent(hf_dir, "a Hugging Face folder, or one of PEFT's")
    verbs.quiet_libraries()
    from igla_mega.checkpoint import adapters, hugging_face

    if (hf_dir / adapters.CONFIG).is_file():
        if base is None:
            raise ConfigError(f"{hf_dir}: adapters of a base that is not given.\n  Add --base CKPT.")
        from igla_mega.checkpoint.folder import resolve_checkpoint

        adapters.import_adapters(hf_dir, resolve_checkpoint(base), checkpoint)
    else:
        from igla_mega.config.features import Moe

        moe = Moe(num_experts=upcycle, num_experts_per_tok=experts_per_token) if upcycle is not None else None
        hugging_face.import_folder(hf_dir, checkpoint, say=print, upcycle=moe)
        hugging_face.print_logit_difference(checkpoint, hf_dir)
    verbs.made(checkpoint, f'igla-mega generate {verbs.quoted(checkpoint)} --prompt "Once"')


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
    verbs.refuse_absent(checkpoint)
    verbs.quiet_libraries()
    verbs.export(checkpoint, hf_dir, adapter_only=adapter_only, merge=merge)


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
    verbs.refuse_absent(checkpoint)
    verbs.quiet_libraries()
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
    verbs.print_scores(checkpoint, sources, scores, as_json=json_)


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many likeliest tokens; 0: no limit.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from so much probability; 1: no limit.")] = 0.95,
    seed: Annotated[
        int | None, typer.Option(help="The same seed draws the same text. Default: another each time.")
    ] = None,
) -> None:
    """Continue a text."""
    verbs.refuse_absent(checkpoint)
    verbs.quiet_libraries()
    verbs.continue_text(
        checkpoint,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )


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
    verbs.quiet_libraries()
    from igla_mega.layout.hardware import num_local_gpus

    gpus = 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else num_local_gpus()
    from igla_mega.doctor import node_test

    limits = node_test.parse_limits(limit or [], on_cpu=not gpus)
    nproc = nproc or gpus or 1
    if not list_ and not verbs.under_launcher() and nproc > 1:
        from igla_mega.distributed.torchrun import torchrun

        raise typer.Exit(torchrun(nproc))
    from igla_mega.doctor.examine import Examination, examine

    asked = Examination(limits, run or Path("runs"), load=not list_, full=full, as_json=json_)
    raise typer.Exit(0 if examine(asked) else 1)


def _load(recipe: str, scale: str | None, overrides: list[str] | None):
    """Load a recipe, and print which keys a scale or an explicit key has changed, once for all ranks."""
    from igla_mega.config import load

    told = os.environ.get("RANK", "0") != "0" or _DATA_CHECKED in os.environ
    say = partial(print, file=sys.stderr, flush=True) if not told else lambda line: None
    return load.load_recipe(recipe, scale=scale, overrides=overrides, say=say)


def _device() -> str:
    from igla_mega.layout.hardware import num_local_gpus

    return "cuda" if num_local_gpus() else "cpu"


def _refuse_before_making(recipe, models: Path | None, num_ranks: int) -> None:
    """Refuse a layout that does not fit before data and a base model are made, which may take a minute."""
    from igla_mega.plan.resolve import resolve, shape_of_base

    base, _ = shape_of_base(recipe, models, "laptop")
    resolve(recipe, num_ranks, _device(), base=base)


def _check_before_launch(recipe, num_ranks: int, models: Path | None) -> None:
    """Find invalid inputs within a second, before ranks import torch, and before a base model is imported."""
    from igla_mega.config.load import base_folder
    from igla_mega.data.prepared import refuse_other_bos
    from igla_mega.layout.stages import parts_of
    from igla_mega.plan.resolve import resolve, shape_of_base
    from igla_mega.prepare.check import check_prepared

    first = recipe.stages[0] if recipe.stages else recipe
    if first.base_model:
        base_folder(first.base_model, models)
    for part in parts_of(recipe):
        refuse_other_bos(part)
    base, _ = shape_of_base(recipe, models)
    resolved = resolve(recipe, num_ranks, _device(), base=base)
    for number, part in enumerate(resolved.parts):
        check_prepared(part, resolved.stages[resolved.first_stage(number)].layout)
