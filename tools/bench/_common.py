"""Share the parts of the benchmarks that are not measured: processes, models, engines, peers, tables and files."""

import argparse
import json
import multiprocessing as mp
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
VOCAB = 32000
MODELS = {
    "A": {"rows": 8, "sequence": 256, "hidden_size": 256, "num_layers": 4, "intermediate_size": 688},
    "B": {"rows": 4, "sequence": 512, "hidden_size": 512, "num_layers": 8, "intermediate_size": 1376},
    "M": {"rows": 8, "sequence": 256, "hidden_size": 256, "num_layers": 4, "intermediate_size": 688},
    "laptop": {
        "rows": 16,
        "sequence": 256,
        "hidden_size": 256,
        "num_layers": 4,
        "intermediate_size": 688,
        "vocab_size": 4096,
    },
}
NUM_HEADS, NUM_KV_HEADS = 8, 2
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NO_SECTIONS: Mapping = MappingProxyType({})
PLAIN: dict[str, Any] = {
    "strategy": "DDP",
    "precision": "FP32",
    "gradient_checkpointing": "none",
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
}
"""Section `distributed` of a run without recomputation, and with data parallelism only."""


def arguments(
    description: str | None, *, rounds: int | None = 7, threads: bool = False, models: bool = False
) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks share: `--write`, and where requested the other three."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if models:
        parser.add_argument("--model", choices=["A", "B"], help="default: both")
    if rounds is not None:
        parser.add_argument(
            "--rounds", type=int, default=rounds, help=f"measurements of each variant; default {rounds}"
        )
    if threads:
        parser.add_argument("--threads", type=int, default=2, help="threads of each variant; default 2")
    parser.add_argument("--write", action="store_true", help="write the results into bench/results/")
    return parser


@dataclass(frozen=True)
class Variant:
    """One thing to time: `build(*args)` returns the function that takes a step and returns its loss (or similar)."""

    build: Callable
    args: tuple = ()
    num_ranks: int = 1
    threads: int = 2
    """Number of threads of each rank."""


class Step(NamedTuple):
    """Measurement of one step of a variant."""

    seconds: float
    """Time of the slowest rank."""
    results: tuple
    """Return value of the step on each rank."""
    memory_bytes: list[int]
    """Peak resident memory of each rank since its start."""


class Processes:
    """A variant in separate processes, one per rank, which sleep between steps."""

    def __init__(self, variant: Variant):
        # Read when torch is loaded: threads of a variant that waits must not spin on the cores of the one that runs.
        os.environ.update(OMP_WAIT_POLICY="passive", KMP_BLOCKTIME="0", OMP_NUM_THREADS=str(variant.threads))
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # megatron.core's on import
        context = mp.get_context("spawn")
        folder = tempfile.mkdtemp(prefix="igla-bench-")
        self._pipes = []
        for rank in range(variant.num_ranks):
            near, far = context.Pipe()
            context.Process(target=_rank_main, args=(variant, rank, folder, far), daemon=True).start()
            far.close()
            self._pipes.append(near)
        for pipe in self._pipes:
            pipe.recv()

    def stop(self) -> None:
        """End the processes after their current step."""
        for pipe in self._pipes:
            pipe.send(None)

    def step(self) -> Step:
        """Take a step on all ranks."""
        for pipe in self._pipes:
            pipe.send("step")
        seconds, results, memory_bytes = zip(*(pipe.recv() for pipe in self._pipes), strict=True)
        return Step(max(seconds), results, list(memory_bytes))


def _rank_main(variant: Variant, rank: int, folder: str, pipe) -> None:
    """Build a variant in this process, and take a step for each message."""
    import torch

    torch.set_num_threads(variant.threads)
    if variant.num_ranks > 1:
        import torch.distributed as dist

        store = dist.FileStore(f"{folder}/store", variant.num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=variant.num_ranks)
    step = variant.build(*variant.args)
    pipe.send("built")
    while pipe.recv():
        started = time.perf_counter()
        result = step()
        pipe.send((time.perf_counter() - started, result, _peak_memory_bytes()))
    os._exit(0)  # an orderly end would wait for peers that may have exited already


def _peak_memory_bytes() -> int:
    """Return the peak resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def in_turns(
    variants: Mapping[str, Variant], rounds: int, *, warm_up: int = 1
) -> tuple[dict[str, Step], dict[str, list[Step]]]:
    """Take a step of every variant in every round, all alive at once.

    The order is reversed from round to round, so that a machine that slowly becomes faster or slower favours none.

    Returns:
        The very first step of each variant (none if `warm_up` is 0), and its steps after the warm-up.
    """
    alive = {name: Processes(variant) for name, variant in variants.items()}
    first: dict[str, Step] = {}
    steps: dict[str, list[Step]] = {name: [] for name in alive}
    for name, processes in alive.items():
        for _ in range(warm_up):
            first.setdefault(name, processes.step())
    for index in range(rounds):
        for name in list(alive)[:: -1 if index % 2 else 1]:
            steps[name].append(alive[name].step())
    for processes in alive.values():
        processes.stop()
    return first, steps


def steps_of(variant: Variant, rounds: int, *, warm_up: int = 1) -> list[Step]:
    """Take steps of one variant, alone on the machine."""
    return in_turns({"": variant}, rounds, warm_up=warm_up)[1][""]


@dataclass(frozen=True)
class Timing:
    """Measurements of a variant."""

    seconds: list[float]
    """Time of the step of each round."""
    first_loss: float
    memory_bytes: list[int]
    """Peak resident memory of each rank."""

    @property
    def median(self) -> float:
        """Median time of a step, in seconds."""
        return statistics.median(self.seconds)

    @property
    def median_ms(self) -> float:
        return round(self.median * 1e3, 1)

    @property
    def peak_rss_mib(self) -> int:
        """Peak resident memory of rank 0, in MiB."""
        return self.memory_bytes[0] >> 20

    @property
    def step_seconds(self) -> list[float]:
        """Times for a results file."""
        return rounded(self.seconds)


def paired(variants: Mapping[str, Variant], rounds: int) -> dict[str, Timing]:
    """Time a step of every variant in every round, as `in_turns`."""
    # The first step allocates; the second is the first one that is like all others.
    first, steps = in_turns(variants, rounds, warm_up=2)
    return {
        name: Timing([step.seconds for step in taken], first[name].results[0], taken[-1].memory_bytes)
        for name, taken in steps.items()
    }


def rounded(values: list[float], digits: int = 4) -> list[float]:
    return [round(value, digits) for value in values]


def ratio(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of the paired ratios."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return dict(zip(("q25", "median", "q75"), (round(q, 3) for q in quartiles), strict=True))


def text(quartiles: dict[str, float]) -> str:
    """Format the result of `ratio`."""
    return f"{quartiles['median']:.2f} [{quartiles['q25']:.2f}-{quartiles['q75']:.2f}]"


def recipe_of(model: str, sections: Mapping = NO_SECTIONS, **distributed):
    """Return the recipe of a model of `MODELS`, without recomputation or parallelism unless `distributed` has it.

    Args:
        sections: further sections of the recipe: `lora`, `sft`, `dpo`, `moe`.
    """
    from igla_mega.config.schema import Recipe

    sizes: dict[str, Any] = dict(MODELS[model])
    num_rows, sequence = sizes.pop("rows"), sizes.pop("sequence")
    num_samples = num_rows // (2 if "dpo" in sections else 1)  # a preference pair has two rows
    heads = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS}
    return Recipe.model_validate(
        {
            "name": model,
            "model": {"vocab_size": VOCAB, **sizes, **heads, "max_position": sequence},
            "training": {"learning_rate": 3e-4, "batch_size": num_samples, "total_steps": 1000},
            "distributed": {**PLAIN, "micro_batch_size": num_samples, **distributed},
            **sections,
        }
    )


def lay_out(recipe, device_name: str = "cpu", *, seed: int | None = None) -> tuple:
    """Join the ranks of this world, and return (layout, mesh, device) of a recipe on them."""
    import torch.distributed as dist

    from igla_mega.distributed import host
    from igla_mega.distributed.mesh import build_mesh, init_process_groups
    from igla_mega.plan.choose import choose_layout

    device = host.prepare()
    if not dist.is_initialized():
        init_process_groups(device)
    layout = choose_layout(recipe, dist.get_world_size(), device_name)
    return layout, build_mesh(layout, recipe.training.seed if seed is None else seed), device


def batch_of(tokens, target_share: float = 1.0):
    """Return a micro-batch of token ids [B, S + 1] on their device; the last `target_share` of each row are targets."""
    import torch

    from igla_mega.data.micro_batch import MicroBatch

    rows, sequence = tokens.size(0), tokens.size(1) - 1
    positions = torch.arange(sequence, device=tokens.device).expand(rows, sequence)
    mask = (positions >= round((1 - target_share) * sequence)).float()
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, positions)


def random_tokens(num_rows: int, length: int, vocab_size: int = VOCAB):
    """Return int64 [num_rows, length], the same values at every call."""
    import torch

    return torch.randint(0, vocab_size, (num_rows, length), generator=torch.Generator().manual_seed(1))


def engine_step(model: str, **distributed) -> Callable[[], float]:
    """Build igla_mega's engine on this rank for a model of `MODELS`; return the function that takes a step."""
    return engine_and_step(model, **distributed)[1]


def engine_and_step(
    model: str, sections: Mapping = NO_SECTIONS, target_share: float = 1.0, **distributed
) -> tuple[Any, Callable[[], float]]:
    """Do as `engine_step`, and return the engine too.

    Args:
        sections: further sections of the recipe: `lora`, `sft`, `dpo`, `moe`.
        target_share: share of each row's tokens, at its end, that are targets.
    """
    import torch

    from igla_mega.distributed import host
    from igla_mega.engine.build import build_engine
    from igla_mega.engine.step import train_step
    from igla_mega.train import dpo_reference

    recipe = recipe_of(model, sections, **distributed)
    host.keep_freed_memory()
    layout, mesh, device = lay_out(recipe)
    engine, _ = build_engine(recipe, layout, mesh, device)
    if recipe.dpo is not None:
        mode = dpo_reference.mode_of(recipe.dpo, adapters=recipe.lora is not None)
        engine = replace(engine, objective=dpo_reference.objective(recipe.dpo, mode, engine))
    rows = layout.micro_batch_size * layout.rows_per_sample
    length = recipe.model.max_position + 1
    micro_batches = random_tokens(MODELS[model]["rows"], length, recipe.model.vocab_size).split(rows)
    needs_reference = recipe.dpo is not None and recipe.lora is None

    def batches() -> Iterator:
        for tokens in micro_batches[mesh.data.rank :: layout.data]:
            batch = batch_of(tokens, target_share)
            yield batch._replace(reference=torch.zeros(rows)) if needs_reference else batch

    return engine, lambda: train_step(engine, batches(), step=0, seed=1, learning_rate=3e-4).loss


def transformers_sizes(model: str) -> dict:
    """Return the arguments for a config of transformers' Llama or Mixtral that has the sizes of a model of `MODELS`."""
    sizes = MODELS[model]
    return {
        "hidden_size": sizes["hidden_size"],
        "num_hidden_layers": sizes["num_layers"],
        "intermediate_size": sizes["intermediate_size"],
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": sizes["sequence"],
        "use_cache": False,
    }


def transformers_llama(model: str):
    """Return a LlamaForCausalLM in fp32 of a model of `MODELS`; its random weights are the same at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**transformers_sizes(model), tie_word_embeddings=False))


def transformers_tokens(model: str):
    """Return the tokens of a step of a model of `MODELS`, int64 [rows, sequence]."""
    return random_tokens(MODELS[model]["rows"], MODELS[model]["sequence"])


def transformers_step(network, tokens, labels) -> Callable[[], float]:
    """Return the function that takes a step of a network of transformers, with torch's AdamW and clipping to 1."""
    import torch

    trained = [param for param in network.parameters() if param.requires_grad]
    adam = torch.optim.AdamW(trained, lr=3e-4)

    def step() -> float:
        adam.zero_grad()
        loss = network(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        return loss.item()

    return step


def machine() -> str:
    """Return the CPU model and the number of cores, which the numbers belong to."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def results_path(name: str) -> Path:
    """Return bench/results/<name>_<date>_<machine>.json."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in machine().lower()).split())
    return REPOSITORY / "bench" / "results" / f"{name}_{time.strftime('%Y-%m-%d')}_{slug}.json"


def cases_of(name: str) -> dict:
    """Return the cases that today's file of results already has, to be kept by a call that measures others."""
    path = results_path(name)
    return json.loads(path.read_text())["cases"] if path.exists() else {}


def write(name: str, result: dict) -> None:
    """Write bench/results/<name>_<date>_<machine>.json, with the command."""
    import torch

    path = results_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", f"tools/bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    about = {"command": command, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "torch": torch.__version__}
    path.write_text(json.dumps(about | result, indent=1) + "\n")
    print(f"wrote {path.relative_to(REPOSITORY)}")
