#!/usr/bin/env python
"""Kill training runs at random instants, resume them, and compare them with uninterrupted runs.

`make chaos` does so 100 times. A rank, the launcher or every process gets SIGKILL: during start-up, between steps, or
while a checkpoint is written. After each kill no process may be left running, every folder with a checkpoint's final
name must be complete, and the same command must resume from the newest one. At the end every step must be logged once,
with the loss, the gradient norm and the samples of an uninterrupted run, bit for bit, and the weights and moments of
the last checkpoint must be equal too.
"""

import argparse
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from igla_mega.checkpoint import integrity

ROOT = Path(__file__).resolve().parents[1]
MARK = "IGLA_CHAOS"
VICTIMS = ("one rank", "the launcher", "all of it")
MOMENTS = ("start-up", "a step", "a step", "a save", "a save")
"""Moments to draw from. Start-up has less weight, since a kill there loses no steps."""
EVERY, LOCAL_EVERY, MOST_STEPS = 6, 2, 10
"""Steps between checkpoints, steps between node-local checkpoints, and maximum number of steps before a kill."""
STEPS = 120
VOCAB, LENGTH = 250, 32
LAYOUTS: dict[str, tuple[int, dict]] = {
    "TP2": (2, {"distributed": {"tensor_parallel": 2}}),
    "FSDP": (2, {"distributed": {"strategy": "FSDP", "tensor_parallel": 1, "pipeline_parallel": 1}}),
    "distributed optimizer, two-level": (
        2,
        {
            "distributed": {"distributed_optimizer": True, "tensor_parallel": 1, "pipeline_parallel": 1},
            "checkpoint": {"local_folder": "FOLDER/node{node}", "local_every_steps": LOCAL_EVERY},
        },
    ),
    "PP2": (2, {"distributed": {"pipeline_parallel": 2, "tensor_parallel": 1}}),
    "one process": (1, {}),
}


@dataclass
class Subject:
    """A run that is killed: the command that starts and resumes it, and the folders that it writes."""

    name: str
    command: list[str]
    run: Path
    reference: Path
    """Folder of the uninterrupted run, which is trained first."""
    steps: int = STEPS
    every: int = EVERY
    local: Path | None = None
    """Folder of node-local checkpoints."""
    environment: Mapping[str, str] = field(default_factory=dict)
    limit_seconds: float = 180.0
    """Maximum time for a start to reach a step, and for the run to end."""
    silence_seconds: float = 20.0
    """Maximum time for all processes to end after the command has ended."""
    faults: list[str] = field(default_factory=list)
    kills: list[dict] = field(default_factory=list)
    start_seconds: float = 5.0
    save_seconds: float = 0.05
    """Estimates of the time of a start and of a save, updated by each kill: kills are drawn within them."""

    def start(self, log: Path) -> tuple[subprocess.Popen, str]:
        """Start the run in a new session; the mark in the environment is inherited by every process that it starts."""
        token = secrets.token_hex(8)
        env = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment, MARK: token}
        with open(log, "wb") as file:
            process = subprocess.Popen(
                self.command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
            )
        return process, token

    def checkpoints(self) -> list[int]:
        """Return the steps of finished checkpoints on shared storage."""
        return integrity.steps_in(self.run / "checkpoints")

    def newest(self) -> int:
        """Return the step that a resume must start from: the newest checkpoint, shared or node-local."""
        return max([0, *self.checkpoints(), *self._local()])

    def _local(self) -> Iterator[int]:
        """Yield the steps of node-local checkpoints of which every rank has a finished part of the same save."""
        num_ranks = int(self.environment.get("NUM_RANKS", "1"))
        for folder in self.local.glob("*/*/step_*") if self.local else ():
            saves = set()
            for place in folder.glob("rank_*/place.json"):
                if (place.parent / integrity.MANIFEST).is_file():
                    saves.add((place.parent.name, json.loads(place.read_text())["save"]))
            if len(saves) == num_ranks and len({save for _, save in saves}) == 1:
                yield integrity.step_of(folder.name) or 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), metavar="NAME")
    parser.add_argument(
        "--folder", type=Path, help="Folder for the runs. Default: a temporary one, deleted on success."
    )
    parser.add_argument("--limit-seconds", type=float, default=180.0, help="Maximum time of a start, and of an end.")
    parser.add_argument("--json", action="store_true", help="Print JSON; progress goes to stderr.")
    args = parser.parse_args()
    folder = args.folder.resolve() if args.folder else Path(tempfile.mkdtemp(prefix="igla-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    out = sys.stderr if args.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=out, flush=True)

    started, subjects = time.monotonic(), []
    shares = [args.kills // len(args.layouts) + (i < args.kills % len(args.layouts)) for i in range(len(args.layouts))]
    say(f"chaos: {args.kills} kills, seed {args.seed}, in {folder}")
    for number, (name, kills) in enumerate(zip(args.layouts, shares, strict=True)):
        if not kills:
            continue
        subject = prepare(folder / re.sub(r"\W+", "-", name), name, args.limit_seconds)
        subjects.append(subject)
        say(f"{name}: uninterrupted run")
        unbroken(subject)
        done = sum(shares[:number])
        torment(subject, kills, random.Random(f"{args.seed} {name}"), _progress(say, args.kills, done, started))
    faults = [f"{subject.name}: {fault}" for subject in subjects for fault in subject.faults]
    if args.json:
        print(json.dumps(summary(subjects, time.monotonic() - started), indent=1))
    else:
        print(table(subjects, time.monotonic() - started))
    if faults:
        say("\n".join([f"chaos: FAILED; the runs are in {folder}", *faults]))
        sys.exit(1)
    if args.folder is None:
        shutil.rmtree(folder)


def _progress(say: Callable[[str], None], total: int, before: int, started: float) -> Callable[[Subject], None]:
    """Return the function that prints a line after each kill, with an estimate of the time left."""

    def progress(subject: Subject) -> None:
        done, kill = before + len(subject.kills), subject.kills[-1]
        left = (time.monotonic() - started) / done * (total - done)
        lost = f"{kill['step'] - kill['newest']} steps lost{'' if kill['sound'] else ': WRONG'}"
        say(
            f"[{done:3}/{total}] {subject.name}: SIGKILL to {kill['victim']} in {kill['moment']}, at step "
            f"{kill['step']}; {lost}; {left / 60:.0f} min left"
        )

    return progress


def prepare(folder: Path, name: str, limit_seconds: float) -> Subject:
    """Write the recipe of a small model and its data, which both runs share."""
    import yaml

    num_ranks, changes = LAYOUTS[name]
    shutil.rmtree(folder, ignore_errors=True)
    write_data(folder / "prepared" / "words")
    recipe: dict = {
        "model": {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 96,
            "vocab_size": VOCAB,
            "max_position": LENGTH,
        },
        "training": {"learning_rate": 1e-2, "batch_size": 8, "total_steps": STEPS, "warmup_steps": 2},
        "distributed": {"precision": "FP32", "micro_batch_size": 2, "timeout_seconds": 60},
        "data": {
            "mix": {"words": 1.0},
            "sources": {"words": str(folder / "words.jsonl")},
            "prepared": str(folder / "prepared"),
        },
        "checkpoint": {"every_steps": EVERY, "keep_last": 2},
        "evaluation": {"every_steps": 0, "num_batches": 1},
        "logging": {"tensorboard": False},
    }
    for section, values in changes.items():
        recipe[section] |= {k: v.replace("FOLDER", str(folder)) if isinstance(v, str) else v for k, v in values.items()}
    (folder / "chaos.yaml").write_text(yaml.safe_dump(recipe))
    words = ["train", str(folder / "chaos.yaml"), "--nproc", str(num_ranks), "--run"]
    return Subject(
        name=name,
        command=[sys.executable, "-m", "igla_mega", *words, str(folder / "run")],
        run=folder / "run",
        reference=folder / "unbroken",
        local=folder if "local_folder" in changes.get("checkpoint", {}) else None,
        environment={"PYTHONPATH": str(ROOT), "NUM_RANKS": str(num_ranks)},
        limit_seconds=limit_seconds,
    )


def write_data(prefix: Path) -> None:
    """Write random tokens as an indexed dataset."""
    import numpy as np

    from igla_mega.data.indexed import IndexedWriter

    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add(np.random.default_rng(3).integers(0, VOCAB, 40_000), np.full(200, 200))


def unbroken(subject: Subject) -> None:
    """Train the uninterrupted run."""
    command = [word if word != str(subject.run) else str(subject.reference) for word in subject.command]
    reference = Subject(subject.name, command, subject.reference, subject.reference, environment=subject.environment)
    log = subject.reference.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    process, token = reference.start(log)
    try:
        if code := process.wait(subject.limit_seconds * 2):
            sys.exit(f"chaos: the uninterrupted run ended with {code}:\n{_tail(log)}")
    finally:
        _kill(marked(token))
    # The node-local folder is shared: the killed run must not find this run's checkpoints there.
    if local := subject.local:
        for folder in local.glob("node*/unbroken-*"):
            shutil.rmtree(folder)


def torment(subject: Subject, kills: int, chance: random.Random, progress: Callable[[Subject], None]) -> None:
    """Kill a run `kills` times, resuming it in between; then let it end and compare it with the uninterrupted one."""
    expected = 0
    while len(subject.kills) < kills:
        moment, victim = chance.choice(MOMENTS), chance.choice(VICTIMS)
        kill = _one_life(subject, moment, victim, chance, expected)
        if kill is None:  # it ended before the kill: check it, and start a new one
            _compare(subject)
            shutil.rmtree(subject.run)
            expected = 0
            continue
        subject.kills.append(kill)
        expected = kill["newest"]
        progress(subject)
    _one_life(subject, None, "", chance, expected)
    _compare(subject)


def _one_life(subject: Subject, moment: str | None, victim: str, chance: random.Random, expected: int) -> dict | None:
    """Start the run and kill it; return the kill, or None if the run ended by itself before."""
    log = subject.run.with_suffix(".log")
    faults_before = len(subject.faults)
    started = time.monotonic()
    process, token = subject.start(log)
    try:
        killed = moment is not None and _strike(subject, process, token, started, (moment, victim), chance)
        if killed:
            _await_silence(subject, process, token, victim, moment or "")
        else:
            code = process.wait(subject.limit_seconds)
            if code:
                subject.faults.append(f"ended with {code} without being killed:\n{_tail(log)}")
            _await_silence(subject, process, token, "no process", "")
    except subprocess.TimeoutExpired:
        subject.faults.append(f"did not end within {subject.limit_seconds:.0f} s:\n{_tail(log)}")
        killed = True
    finally:
        _kill(marked(token))
        process.wait()
    _check_resume(subject, log, expected)
    step = _check_files(subject)
    newest = subject.newest()
    if killed and newest < expected:
        subject.faults.append(
            f"the checkpoint of step {expected} was complete, and after a kill {newest} is the newest"
        )
    # A save starts only after the previous one has finished, so at most the last two can be missing.
    if killed and step - newest > 2 * subject.every:
        subject.faults.append(f"{step - newest} steps lost, with a checkpoint every {subject.every}")
    if not killed:
        return None
    sound = len(subject.faults) == faults_before
    return {"moment": moment, "victim": victim, "step": step, "newest": newest, "sound": sound}


def _strike(
    subject: Subject,
    process: subprocess.Popen,
    token: str,
    started: float,
    target: tuple[str, str],
    chance: random.Random,
) -> bool:
    """Wait for the moment and kill; return False if the run ended before."""
    moment, victim = target
    deadline, metrics = started + subject.limit_seconds, subject.run / "metrics.jsonl"
    if moment == "start-up":
        time.sleep(chance.random() * subject.start_seconds)
        return _shoot(process, marked(token), victim, chance)
    before, num_steps = _signature(metrics), chance.randint(1, MOST_STEPS)
    while not _has_stepped(metrics, before, started):
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    subject.start_seconds = time.monotonic() - started
    ranks, first = marked(token), last_step(metrics)
    if moment == "a step":
        while process.poll() is None and last_step(metrics) < first + num_steps and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.03)
        return _shoot(process, ranks, victim, chance)
    checkpoints = subject.run / "checkpoints"
    while process.poll() is None and not _writing(checkpoints) and time.monotonic() < deadline:
        time.sleep(0.0005)
    # Kill at a random time within the save. A save that ends earlier corrects the estimate of its duration.
    began, delay = time.monotonic(), chance.random() * 1.2 * subject.save_seconds
    while time.monotonic() < began + delay:
        if not _writing(checkpoints):
            subject.save_seconds = max(0.005, time.monotonic() - began)
            break
        time.sleep(0.0005)
    else:
        subject.save_seconds *= 1.1
    return _shoot(process, ranks, victim, chance)


def _shoot(process: subprocess.Popen, ranks: Mapping[int, str], victim: str, chance: random.Random) -> bool:
    """Send SIGKILL to a random rank, all processes or the launcher; return False if the run has ended."""
    if process.poll() is not None:
        return False
    workers = sorted(pid for pid, rank in ranks.items() if rank)
    if victim == "one rank" and workers:
        _kill({chance.choice(workers): ""})
    elif victim == "all of it":
        _kill(ranks)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    return True


def _await_silence(subject: Subject, process: subprocess.Popen, token: str, victim: str, moment: str) -> None:
    """Check that all other processes end by themselves after a kill."""
    code = process.wait(subject.limit_seconds)
    if victim == "one rank" and code == 0:
        subject.faults.append(f"a rank was killed in {moment}, but the command ended with 0")
    deadline = time.monotonic() + subject.silence_seconds
    while left := marked(token):
        if time.monotonic() > deadline:
            subject.faults.append(f"{len(left)} processes were left running after a kill of {victim}: {sorted(left)}")
            return
        time.sleep(0.05)


def _check_resume(subject: Subject, log: Path, expected: int) -> None:
    """Check by its log that a run resumed from the newest complete checkpoint."""
    text = log.read_text(errors="replace")
    resumed = re.search(r"resuming at step (\d+)", text)
    if resumed and int(resumed[1]) != expected:
        subject.faults.append(f"resumed at step {resumed[1]}, but the checkpoint of step {expected} was complete")
    if not resumed and expected and _trained(text):
        subject.faults.append(f"started from step 0, but the checkpoint of step {expected} was complete")
    if "damaged" in text or "digest" in text:
        subject.faults.append(f"a checkpoint was found damaged:\n{_tail(log)}")


def _trained(text: str) -> bool:
    """Return True if a log has a training step."""
    return re.search(r"^step +\d+/", text, re.MULTILINE) is not None


def _check_files(subject: Subject) -> int:
    """Check the files after a kill; return the last logged step."""
    roots = [subject.run / "checkpoints", *(subject.local.glob("*/*") if subject.local else ())]
    for folder in (path for root in roots for path in root.glob("step_*")):
        for one in integrity.sealed(folder):
            if any(one.iterdir()) and (reason := integrity.damage(one)) is not None:
                subject.faults.append(f"incomplete under its final name: {reason}")
    for name in ("metrics.jsonl", "ledger.jsonl"):
        numbers, broken = written_steps(subject.run / name)
        if numbers != list(range(1, len(numbers) + 1)):
            subject.faults.append(f"{name}: steps are not 1, 2, 3 ... each once: {_odd(numbers)}")
        if broken:
            subject.faults.append(f"{name}: line {broken} is incomplete, and not the last")
    return last_step(subject.run / "metrics.jsonl")


def _compare(subject: Subject) -> None:
    """Compare a run that has ended with the uninterrupted one."""
    for name, keys in (("metrics.jsonl", ("loss", "grad_norm")), ("ledger.jsonl", ("sources",))):
        ours, theirs = (_values(run / name, keys) for run in (subject.run, subject.reference))
        if len(theirs) != subject.steps:
            subject.faults.append(f"{name}: the uninterrupted run has {len(theirs)} steps, not {subject.steps}")
        if ours == theirs:
            continue
        missing = sorted(theirs.keys() - ours.keys())
        unequal = [step for step in theirs.keys() & ours.keys() if theirs[step] != ours[step]]
        first = (
            f"; first: step {min(unequal)}: {ours[min(unequal)]}, uninterrupted {theirs[min(unequal)]}"
            if unequal
            else ""
        )
        subject.faults.append(f"{name}: {len(missing)} steps missing, {len(unequal)} differ{first}")
    if _tensors(subject.run) != _tensors(subject.reference):
        subject.faults.append("the tensors of the last checkpoint differ from those of the uninterrupted run")


def _tensors(run: Path) -> dict[str, tuple[int, str]]:
    """Return size and digest of each tensor file of the last checkpoint."""
    steps = integrity.steps_in(run / "checkpoints")
    if not steps:
        return {}
    manifest = integrity.step_dir(run / "checkpoints", steps[-1]) / integrity.MANIFEST
    files = integrity.read_manifest(manifest.read_bytes())
    return {name: entry for name, entry in files.items() if name.endswith(".distcp")}


def _values(path: Path, keys: tuple[str, ...]) -> dict[int, list]:
    """Return the values of some keys by step."""
    return {entry["step"]: [entry[key] for key in keys] for entry, _ in _entries(path) if entry and keys[0] in entry}


def written_steps(path: Path) -> tuple[list[int], int]:
    """Return the steps of a JSONL file in its order, and the number of a broken line before the last (0: none)."""
    steps, broken, entries = [], 0, list(_entries(path))
    for number, (entry, whole) in enumerate(entries, 1):
        if entry is None or not whole:
            broken = number if number < len(entries) else broken
        elif "loss" in entry or "sources" in entry:
            steps.append(entry["step"])
    return steps, broken


def _entries(path: Path) -> Iterator[tuple[dict | None, bool]]:
    """Yield the object of each line (None if it is not JSON), and True if the line has its end."""
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            yield json.loads(line), line.endswith("\n")
        except ValueError:
            yield None, False


def last_step(metrics: Path) -> int:
    """Return the last logged training step, read from the end of the file; 0 if there is none."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
            found = re.findall(rb'^\{"step": (\d+).*"loss"', file.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[-1]) if found else 0


def _signature(path: Path) -> tuple[int, int]:
    """Return inode and size of a file, zeros if it does not exist."""
    try:
        info = path.stat()
    except OSError:
        return 0, 0
    return info.st_ino, info.st_size


def _has_stepped(metrics: Path, before: tuple[int, int], started: float) -> bool:
    """Return True if a start has logged a step: it first replaces the file, and then appends."""
    now = _signature(metrics)
    if now == before or not now[1]:
        return False
    if now[0] == before[0] and before[1]:
        return False  # not replaced yet
    try:
        newest = json.loads(metrics.read_bytes().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return False
    return time.time() - metrics.stat().st_mtime < time.monotonic() - started and "loss" in newest


def _writing(checkpoints: Path) -> bool:
    return any(checkpoints.glob(".writing_*"))


def marked(token: str) -> dict[int, str]:
    """Return the living processes with a mark: pid -> rank, an empty text for those that are not ranks."""
    found = {}
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get(MARK) == token and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = environment.get("RANK", "")
        except (psutil.Error, OSError):
            continue
    return found


def _kill(pids: Mapping[int, str]) -> None:
    """Send SIGKILL to processes, some of which may have ended."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _odd(numbers: list[int]) -> str:
    """Name the steps that are logged twice or missing."""
    twice = sorted(number for number, count in Counter(numbers).items() if count > 1)
    missing = sorted(set(range(1, max(numbers) + 1)) - set(numbers))
    return f"twice {twice[:5]}, missing {missing[:5]}"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-12:])


def summary(subjects: list[Subject], seconds: float) -> dict:
    """Return the kills and faults of all runs, for `--json`."""
    return {
        "seconds": round(seconds, 1),
        "kills": sum(len(subject.kills) for subject in subjects),
        "sound": not any(subject.faults for subject in subjects),
        "layouts": {s.name: {"kills": s.kills, "faults": s.faults} for s in subjects},
    }


def table(subjects: list[Subject], seconds: float) -> str:
    """Return a table of kills by layout and moment, with the maximum of lost steps and the number of faults."""
    moments = list(dict.fromkeys(MOMENTS))
    heads = ["kills", *(f"in {moment}" for moment in moments), "most lost", "wrong"]
    lines = [f"{'':34}" + "".join(f"{head:>12}" for head in heads)]
    for subject in subjects:
        counts = Counter(kill["moment"] for kill in subject.kills)
        lost = max((kill["step"] - kill["newest"] for kill in subject.kills), default=0)
        cells = [len(subject.kills), *(counts[moment] for moment in moments), lost, len(subject.faults)]
        lines.append(f"{subject.name:34}" + "".join(f"{cell:>12}" for cell in cells))
    total, wrong = sum(len(s.kills) for s in subjects), sum(len(s.faults) for s in subjects)
    lines.append(
        f"{total} kills in {seconds / 60:.1f} minutes: "
        + (f"{wrong} things wrong" if wrong else "every run resumed, and its result equals the uninterrupted one")
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
