"""What the benchmarks share: variants that live side by side in processes of their own, models, tables, files."""

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


@dataclass(frozen=True)
class Variant:
    """One thing to time: `build(*args)` returns the function that takes a step and returns its loss (or the like)."""

    build: Callable
    args: tuple = ()
    num_ranks: int = 1
    threads: int = 2
    """Of each rank."""


class Processes:
    """A variant alive in its own processes, asleep between steps."""

    def __init__(self, variant: Variant):
        # Read when torch is loaded: the threads of a variant that waits must leave the cores to the one that runs.
        os.environ.update(OMP_WAIT_POLICY="passive", KMP_BLOCKTIME="0", OMP_NUM_THREADS=str(variant.threads))
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # megatron.core's on import
        context = mp.get_context("spawn")
        folder = tempfile.mkdtemp(prefix="igla-bench-")
        self._pipes = []
        for rank in range(variant.num_ranks):
            ours, theirs = context.Pipe()
            context.Process(target=_rank_main, args=(variant, rank, folder, theirs), daemon=True).start()
            theirs.close()
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)

    def step(self) -> tuple:
        """Take a step: its seconds (of the slowest rank), what it returns, and the peak memory of each rank, bytes."""
        for pipe in self._pipes:
            pipe.send("step")
        seconds, results, memory_bytes = zip(*(pipe.recv() for pipe in self._pipes), strict=True)
        return max(seconds), results[0], list(memory_bytes)


def _rank_main(variant: Variant, rank: int, folder: str, pipe) -> None:
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
    os._exit(0)  # the peers may have gone already


def _peak_memory_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@dataclass(frozen=True)
class Timing:
    seconds: list[float]
    """One of each round."""
    first_loss: float
    memory_bytes: list[int]
    """Peak of each rank."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def paired(variants: dict[str, Variant], rounds: int) -> dict[str, Timing]:
    """Time a step of every variant in every round, all alive at once, the order reversed from round to round."""
    alive = {name: Processes(variant) for name, variant in variants.items()}
    # The first step allocates; the second is the first that is like all others.
    first_losses = {name: [processes.step(), processes.step()][0][1] for name, processes in alive.items()}
    seconds: dict[str, list[float]] = {name: [] for name in alive}
    memory: dict[str, list[int]] = {}
    for index in range(rounds):
        for name in list(alive)[:: -1 if index % 2 else 1]:
            taken, _, memory[name] = alive[name].step()
            seconds[name].append(taken)
    for processes in alive.values():
        processes.stop()
    return {name: Timing(seconds[name], first_losses[name], memory[name]) for name in alive}


def ratio(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Median and quartiles of the paired ratios."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return dict(zip(("q25", "median", "q75"), (round(q, 3) for q in quartiles), strict=True))


def text(quartiles: dict[str, float]) -> str:
    return f"{quartiles['median']:.2f} [{quartiles['q25']:.2f}-{quartiles['q75']:.2f}]"


def engine_step(model: str, **distributed) -> Callable[[], float]:
    """Build igla_mega's engine on this rank for a model of `MODELS`; returns the function that takes a step."""
    return engine_and_step(model, **distributed)[1]


def engine_and_step(
    model: str, sections: Mapping = MappingProxyType({}), target_share: float = 1.0, **distributed
) -> tuple:
    """As `engine_step`, with the engine itself.

    Args:
        sections: more of the recipe: `lora`, `sft`, `dpo`.
        target_share: of a row's tokens, those at its end that are targets.
    """
    import torch
    import torch.distributed as dist

    from igla_mega.config.schema import Recipe
    from igla_mega.data.micro_batch import MicroBatch
    from igla_mega.distributed import host
    from igla_mega.distributed.mesh import build_mesh, init_process_groups
    from igla_mega.engine.build import build_engine
    from igla_mega.engine.step import train_step
    from igla_mega.plan.choose import choose_layout
    from igla_mega.train import dpo_reference

    sizes = dict(MODELS[model])
    num_rows, sequence = sizes.pop("rows"), sizes.pop("sequence")
    rows_per_sample = 2 if "dpo" in sections else 1
    recipe = Recipe.model_validate(
        {
            "name": model,
            "model": {
                "vocab_size": VOCAB,
                **sizes,
                "num_heads": NUM_HEADS,
                "num_kv_heads": NUM_KV_HEADS,
                "max_position": sequence,
            },
            "training": {"learning_rate": 3e-4, "batch_size": num_rows // rows_per_sample, "total_steps": 1000},
            "distributed": {
                "strategy": "DDP",
                "precision": "FP32",
                "gradient_checkpointing": "none",
                "tensor_parallel": 1,
                "pipeline_parallel": 1,
                "micro_batch_size": num_rows // rows_per_sample,
                **distributed,
            },
            **sections,
        }
    )
    assert recipe.model is not None, "given above"
    vocab_size = recipe.model.vocab_size
    device = host.prepare()
    host.keep_freed_memory()
    if not dist.is_initialized():
        init_process_groups(device)
    layout = choose_layout(recipe, dist.get_world_size(), "cpu")
    mesh = build_mesh(layout, recipe.training.seed)
    engine, _ = build_engine(recipe, layout, mesh, device)
    if recipe.dpo is not None:
        mode = dpo_reference.mode_of(recipe.dpo, adapters=recipe.lora is not None)
        engine = replace(engine, objective=dpo_reference.objective(recipe.dpo, mode, engine))

    def batches() -> Iterator[MicroBatch]:
        rows = layout.micro_batch_size * rows_per_sample
        for tokens in random_tokens(num_rows, sequence + 1, vocab_size).split(rows)[mesh.data.rank :: layout.data]:
            positions = torch.arange(sequence).expand(rows, sequence)
            batch = MicroBatch(
                tokens=tokens[:, :-1].contiguous(),
                labels=tokens[:, 1:].contiguous(),
                loss_mask=(positions >= round((1 - target_share) * sequence)).float(),
                position_ids=positions,
            )
            cached = recipe.dpo is not None and recipe.lora is None
            yield batch._replace(reference=torch.zeros(rows)) if cached else batch

    return engine, lambda: train_step(engine, batches(), step=0, seed=1, learning_rate=3e-4).loss


def transformers_sizes(model: str) -> dict:
    """What a config of transformers' Llama or Mixtral says of a model of `MODELS`."""
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


def transformers_step(network, tokens, labels) -> Callable[[], float]:
    """The function that takes a step of a network of transformers, with torch's default AdamW, clipping to 1."""
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


def random_tokens(num_rows: int, length: int, vocab_size: int = VOCAB):
    """[num_rows, length] int64, the same whenever it is asked for."""
    import torch

    return torch.randint(0, vocab_size, (num_rows, length), generator=torch.Generator().manual_seed(1))


def machine() -> str:
    """What the numbers belong to: CPU model and number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def results_path(name: str) -> Path:
    """bench/results/<name>_<date>_<machine>.json."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in machine().lower()).split())
    return REPOSITORY / "bench" / "results" / f"{name}_{time.strftime('%Y-%m-%d')}_{slug}.json"


def cases_of(name: str) -> dict:
    """The cases that today's file has already, of calls that took others."""
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
