"""Run recipe 1 on this machine, from raw text to a model that Hugging Face opens (`make demo`).

It writes a corpus, a tokenizer and datasets, and trains on two tensor-parallel ranks. The run is killed by SIGKILL,
resumed, and compared with what it had logged before; then follow text, perplexity, an export, and the page of the run.
Everything is written to ./demo.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from igla_mega.data.prepared import source_prefixes
from igla_mega.prepare.sources import unigram_entropy

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ("pretrain_7b", "--scale", "laptop")
KILLED_AFTER = 12
"""Number of steps from the last checkpoint to the kill; they are repeated after the resume."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "demo")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    folder, started = options.folder, time.monotonic()
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    os.environ["IGLA_CACHE"] = str(folder / "data")
    run, checkpoint_every = folder / "run", max(1, options.steps // 3)
    settings = [
        f"training.total_steps={options.steps}",
        f"checkpoint.every_steps={checkpoint_every}",
        f"evaluation.every_steps={checkpoint_every}",
    ]
    train = ["train", *RECIPE, "--nproc", "2", "--run", str(run)]
    train += [word for setting in settings for word in ("--set", setting)]

    heading("1. Five sources of text, a tokenizer, indexed datasets")
    igla("prepare", *RECIPE)

    kill_at = 2 * checkpoint_every + KILLED_AFTER
    heading(f"2. Two tensor-parallel ranks train; SIGKILL at step {kill_at}")
    train_and_kill(train, run / "metrics.jsonl", kill_at)
    before = losses(run / "metrics.jsonl")
    print(f"killed at step {max(before)}")

    heading("3. The same command resumes from the last checkpoint")
    igla(*train)
    after = losses(run / "metrics.jsonl")
    again = [step for step in before if step > 2 * checkpoint_every]
    differing = [step for step in again if before[step] != after[step]]
    verdict = "NOT the same" if differing else "bit for bit the same"
    print(f"steps {again[0]} to {again[-1]} were taken twice: {verdict}")

    heading("4. Text from the model")
    prompt = "def __init__(self"
    igla("generate", str(run), "--prompt", prompt, "--max-new-tokens", "80", "--temperature", "0.7", "--seed", "1")

    heading("5. Loss on held-out text")
    igla("eval", str(run))

    heading("6. Export to Hugging Face")
    igla("export", str(run), str(folder / "huggingface"))

    heading("7. The run on one page")
    igla("report", str(run))

    entropy, last = context_free_loss(run / "recipe.yaml"), after[max(after)]
    print(f"\nunigram entropy of the corpus {entropy:.3f} nats/token; loss at step {max(after)}: {last:.3f}")
    print(f"demo: {time.monotonic() - started:.0f} s, results in {folder}")
    if differing or last > entropy - 1.0:
        sys.exit("demo: FAILED: the resumed run differs, or the loss is not far below the unigram entropy")


def heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def igla(*words: str) -> None:
    """Run a command of igla-mega."""
    subprocess.run([sys.executable, "-m", "igla_mega", *words], check=True)


def train_and_kill(train: list[str], metrics: Path, step: int) -> None:
    """Start a run, and kill all of its processes once it has logged `step`."""
    process = subprocess.Popen([sys.executable, "-m", "igla_mega", *train], start_new_session=True)
    while process.poll() is None and max(losses(metrics), default=0) < step:
        time.sleep(0.2)
    if process.poll() is not None:
        sys.exit(f"demo: FAILED: training ended with {process.returncode} before step {step}")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def losses(metrics: Path) -> dict[int, float]:
    """Return the training loss by step."""
    entries = {}
    if metrics.exists():
        for line in metrics.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line being written
                continue
            if "loss" in entry:
                entries[entry["step"]] = entry["loss"]
    return entries


def context_free_loss(recipe: Path) -> float:
    """Return the loss, in nats per token, of a model that only has the frequency of each token."""
    from igla_mega.config.load import load_recipe

    data = load_recipe(recipe).data
    return unigram_entropy(source_prefixes(data), data.mix)


if __name__ == "__main__":
    main()
