"""How runs end from outside and go on: a scheduler's signals, nodes that go, a folder that is taken."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ranks
import small_run
from small_run import events, lines, losses, write_recipe
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState

from igla_mega import run as engine
from igla_mega.checkpoint import store
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Dpo
from igla_mega.config.load import load_recipe
from igla_mega.distributed import torchrun
from igla_mega.report.page import Page
from igla_mega.train import loop
from igla_mega.train.run_folder import lock_run_folder

LIMIT_SECONDS = 300
ROOT = Path(__file__).resolve().parents[2]
LONG = {"learning_rate": 1e-2, "batch_size": 8, "total_steps": 100_000}


def start(*arguments, **variables) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-m", "igla_mega", "train", *map(str, arguments)],
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[0]
        time.sleep(0.05)


def ended(process: subprocess.Popen) -> str:
    """What it said; nothing of its family outlives it."""
    family = psutil.Process(process.pid).children(recursive=True)
    said, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert psutil.wait_procs(family, timeout=60)[1] == [], said
    return said


@pytest.mark.parametrize(
    ("nproc", "number", "code"),
    [
        # Of one rank the command is the rank; of two it passes the signal on.
        (1, signal.SIGUSR1, 75),
        (2, signal.SIGTERM, 75),
        (2, signal.SIGINT, 130),
    ],
)
def test_a_signal_to_the_command_saves_the_step_and_ends_with_the_code_that_requeues(nproc, number, code, tmp_path):
    run = tmp_path / "run"
    process = start(write_recipe(tmp_path, training=LONG), "--run", run, "--nproc", nproc)
    until(process, lambda: len(losses(run)) > 2 if (run / "metrics.jsonl").exists() else False)
    process.send_signal(number)
    said = ended(process)
    assert process.returncode == code, said
    step = max(losses(run))
    assert (run / "checkpoints/latest").read_text().strip() == f"step_{step:08d}", said
    assert f"stopping after step {step}, as {number.name} requested" in said and "Traceback" not in said
    assert "stopping" in events(run) and events(run)[-1] == "saved"


def test_a_second_signal_ends_at_once_even_inside_a_collective(tmp_path):
    run = tmp_path / "run"
    process = start(
        write_recipe(tmp_path, training=LONG), "--run", run, "--nproc", 2, "--set", "checkpoint.every_steps=2"
    )
    until(process, lambda: (run / "checkpoints/latest").exists())
    [rank] = [p for p in psutil.Process(process.pid).children() if p.environ()["RANK"] == "1"]
    rank.suspend()  # the other waits for it
    process.send_signal(signal.SIGTERM)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    rank.resume()
    said = ended(process)
    assert process.returncode == 75 and "ended at once" in said, said
    assert (run / "checkpoints/latest").exists()


def refusals(recipe: str, run_dir: str) -> tuple[str, str]:
    """Errors of a second run in a folder, and of one with another recipe."""
    small, run = load_recipe(recipe), Path(run_dir)
    kept = lock_run_folder(run, small)
    said = []
    for other in (small, small.model_copy(update={"name": "other", "dpo": Dpo()})):
        with pytest.raises(ConfigError) as refused:
            lock_run_folder(run, other)
        said.append(str(refused.value))
        kept.close()
    return said[0], said[1]


def test_a_folder_in_use_names_the_process_and_another_recipes_is_refused(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    small_run.train(1, recipe, run)
    before = sorted(path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock")
    [(in_use, other)] = ranks.run(1, refusals, str(recipe), str(run))
    assert f"{run}: another run is training in this folder: process " in in_use
    assert f" on {socket.gethostname()}, since 20" in in_use
    assert f"{run}: contains a run of another recipe: recipe `small` and not `other`, without `dpo`" in other
    assert sorted(path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock") == before


def start_in_a_taken_folder(recipe: str, run_dir: str) -> str:
    store = small_run.own_world()
    kept = lock_run_folder(Path(run_dir), load_recipe(recipe))
    with pytest.raises(ConfigError) as refused:
        engine.train(load_recipe(recipe), Path(run_dir))
    kept.close()
    del store
    return str(refused.value)


def test_a_second_run_in_a_folder_touches_nothing_of_the_first(tmp_path):
    recipe, stack = write_recipe(tmp_path), tmp_path / "run/hang/stack_rank_0.txt"
    stack.parent.mkdir(parents=True)
    stack.write_text("of the first run")
    [said] = ranks.run(1, start_in_a_taken_folder, str(recipe), str(tmp_path / "run"))
    assert "another run is training in this folder" in said
    assert stack.read_text() == "of the first run"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path))
    for run in (tmp_path / "small.yaml", tmp_path / "small.yaml/run"):
        with pytest.raises(ConfigError, match="cannot be created or written"):
            lock_run_folder(run, recipe)


def test_a_recipe_that_was_cut_short_does_not_keep_a_run_from_going_on(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    small_run.train(1, recipe, run)
    whole = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text("")
    [said] = small_run.train(1, recipe, run)
    assert "nothing to do" in said and (run / "recipe.yaml").read_text() == whole


def signalled_in_step(number: int, recipe: str, run_dir: str) -> int:
    """Train, with a scheduler's signal in a step; the exit code."""
    store, take = small_run.own_world(), loop.train_step

    def signalled(*args, step: int, **given):
        if step + 1 == number:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # a thread hears it
        return take(*args, step=step, **given)

    loop.train_step = signalled
    code = engine.train(load_recipe(recipe), Path(run_dir))
    del store
    return code


def test_a_signal_in_the_last_step_leaves_a_run_that_has_ended(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    assert ranks.run(1, signalled_in_step, 8, str(recipe), str(run)) == [0]
    assert events(run)[-1] == "finished" and "stopping" not in events(run)


@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_in_the_last_step_of_a_phase_stops_before_its_fisher_is_taken(step, tmp_path):
    phases = [{"name": name, "data": "words", "tokens": 512, "lr": 1e-2} for name in "ab"]
    recipe = write_recipe(
        tmp_path,
        training={"batch_size": 8, "total_steps": None, "learning_rate": None},
        curriculum={"phases": phases},
        continual={"ewc_lambda": 10, "fisher_samples": 4},
    )
    run = tmp_path / "run"
    assert ranks.run(1, signalled_in_step, step, str(recipe), str(run)) == [75]
    assert events(run).count("stopping") == 1 and max(losses(run)) == step
    assert (len([one for one in lines(run, "metrics.jsonl") if "forgetting_matrix" in one]), step) in ((0, 2), (1, 4))
    assert ranks.run(1, signalled_in_step, 0, str(recipe), str(run)) == [0]
    small_run.train(1, recipe, tmp_path / "unbroken")
    assert losses(run) == losses(tmp_path / "unbroken") and events(run)[-1] == "finished"


def run_python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"import os, signal, threading\nfrom igla_mega import cli, verbs\n{code}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS)


def test_a_schedulers_signal_before_a_run_listens_asks_to_be_requeued():
    assert run_python("verbs.exit_on_signals(); os.kill(os.getpid(), signal.SIGUSR1); signal.pause()").returncode == 75


def test_a_mistake_that_every_rank_meets_is_said_once():
    ended = run_python(
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "cli._fail('a mistake', 2)"
    )
    assert (ended.returncode, ended.stderr) == (-signal.SIGTERM, "")


@pytest.mark.parametrize(
    ("code", "fixed", "left"),
    [(2, True, 0), (75, True, 0), (130, True, 0), (75, False, 3), (1, True, 3), (76, True, 3)],
)
def test_ranks_that_would_end_the_same_way_again_are_not_started_again(code, fixed, left, monkeypatch):
    agent = object.__new__(torchrun._Agent)
    agent.fixed, agent._remaining_restarts = fixed, 3
    result = RunResult(WorkerState.FAILED, failures={0: SimpleNamespace(exitcode=code)})
    monkeypatch.setattr(torchrun.LocalElasticAgent, "_monitor_workers", lambda *_: result)
    assert agent._monitor_workers(SimpleNamespace()) is result and agent._remaining_restarts == left


@pytest.mark.parametrize(
    ("failures", "stop_signal", "expected"),
    [
        ({0: (1, 2.0), 1: (-9, 1.0)}, 0, ("killed", "rank 1 was ended by SIGKILL (the kernel also sends", 1)),
        ({0: (1, 7.0), 1: (-9, 7.0)}, 0, ("killed", "rank 1 was ended by SIGKILL", 1)),
        ({0: (1, 7.0), 1: (-9, 8.0)}, 0, ("killed", "rank 1 was ended by SIGKILL", 1)),
        ({0: (1, 7.0), 1: (-11, 9.0)}, 0, ("failed", "rank 0 ended first, with exit code 1", 1)),
        ({0: (2, 7.0), 1: (-15, 7.0)}, 0, ("failed", "rank 0 ended first, with exit code 2", 2)),
        ({0: (-15, 7.0), 1: (-9, 7.0)}, 0, ("killed", "rank 1 was ended by SIGKILL", 1)),
        ({0: (-15, 7.0), 1: (75, 7.0)}, signal.SIGTERM, None),
        ({0: (-11, 1.0)}, 0, ("killed", "rank 0 was ended by SIGSEGV", 1)),
        ({0: (1, 1.0), 3: (1, 0.5)}, 0, ("failed", "rank 3 ended first, with exit code 1", 1)),
        ({0: (2, 1.0)}, 0, ("failed", "rank 0 ended first, with exit code 2", 2)),
        ({0: (76, 2.0), 1: (-9, 1.0)}, 0, ("hung", "the watchdog ended the run, which was stuck", 76)),
        ({0: (75, 1.0)}, 0, None),
        ({0: (75, 1.0)}, signal.SIGTERM, None),
        ({0: (130, 1.0)}, signal.SIGINT, None),
        ({0: (-9, 1.0)}, signal.SIGTERM, ("killed", "rank 0 was ended by SIGKILL", 75)),
        ({0: (1, 1.0)}, signal.SIGTERM, ("failed", "rank 0 ended first, with exit code 1", 1)),
    ],
)
def test_a_launcher_reports_the_first_rank_that_ended_unless_it_recorded_its_stop(failures, stop_signal, expected):
    agent, said = object.__new__(torchrun._Agent), []
    agent.stop_signal, agent.oom_kills = stop_signal, 2**60
    agent.ended = lambda *ended: said.append(ended)
    ended = {rank: SimpleNamespace(exitcode=code, timestamp=time) for rank, (code, time) in failures.items()}
    code = agent.report(RunResult(WorkerState.FAILED, failures=ended))
    assert len(said) == (expected is not None)
    for (kind, message, its_code), wanted in zip(said, [expected], strict=False):
        assert (kind, its_code, code) == (wanted[0], wanted[2], wanted[2]) and message.startswith(wanted[1])


def test_a_kill_for_want_of_memory_is_told_from_another(monkeypatch):
    killed = RunResult(WorkerState.FAILED, failures={0: SimpleNamespace(exitcode=-9, timestamp=0.0)})
    before = torchrun._oom_kills()
    assert before >= 0
    monkeypatch.setattr(torchrun, "_oom_kills", lambda: before + 1)
    assert "out of memory: the kernel killed" in torchrun._cause(killed, before)[1]
    assert "the kernel also sends SIGKILL" in torchrun._cause(killed, before + 1)[1]


def full_disk() -> None:
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    store._write_folder = refuse


def test_a_run_that_took_all_steps_and_saved_none_has_failed_and_is_not_finished(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    [said] = small_run.train(1, recipe, run, full_disk)
    assert "All training of this run is lost" in said and max(losses(run)) == 8
    summary = Page([run]).runs[0].summary()
    assert (summary["state"], summary["step"], summary["total_steps"]) == ("failed", 8, 8)
    assert "No space left on device" in summary["cause"] and "is lost" in summary["cause"]
    small_run.train(1, recipe, run)
    assert Page([run]).runs[0].summary()["state"] == "finished" and "died" not in events(run)
    small_run.train(1, recipe, run)  # nothing to do
    assert Page([run]).runs[0].summary()["state"] == "finished"
    assert "  tensor_parallel: 1\n" in (text := (run / "recipe.yaml").read_text())
    assert "  context_parallel: auto  # used: 1\n" in text and "  kernels: auto  # used: local\n" in text


def test_the_page_tells_of_a_killed_rank_and_of_a_killed_launcher_at_once(tmp_path):
    run = tmp_path / "run"
    options = ["--run", run, "--nproc", 2, "--restarts", 1, "--set", "checkpoint.every_steps=2"]
    process = start(write_recipe(tmp_path, training=LONG), *options)
    until(process, (run / "checkpoints/latest").exists)
    assert Page([run]).runs[0].summary()["state"] == "running"
    [rank] = [p for p in psutil.Process(process.pid).children() if p.environ()["RANK"] == "1"]
    rank.kill()
    until(process, lambda: "resumed" in events(run))
    [again] = [one for one in lines(run, "events.jsonl") if one["event"] == "restarting"]
    assert (
        again["message"].startswith("rank 1 was ended by SIGKILL") and "the ranks are started again" in again["message"]
    )
    until(process, lambda: max(losses(run)) > again["step"] + 2)
    assert Page([run]).runs[0].summary()["state"] == "running"
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # the ranks go with it, and nobody is left who could write
    assert psutil.wait_procs(family, timeout=60)[1] == []
    process.communicate()
    summary = Page([run]).runs[0].summary()
    assert (summary["state"], summary["says"][:4]) == ("dead", "dead"), summary
    assert "ended without a record" in summary["cause"] and "the last checkpoint is that of step" in summary["cause"]
    assert summary["command"].startswith("igla-mega train ") and "--restarts 1" in summary["command"]


def train_until(step: int, recipe: str, run_dir: str) -> None:
    store = small_run.own_world()
    engine.train(load_recipe(recipe), Path(run_dir), stop_after=step)
    del store


def test_a_node_joins_and_goes_and_the_samples_stay_the_same(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    recipe = write_recipe(tmp_path, training={**LONG, "learning_rate": 1e-3})
    run, alone = tmp_path / "run", tmp_path / "alone"
    nodes = ["--nproc", 1, "--nnodes", "1:2", "--rendezvous", f"localhost:{port}", "--restarts", 3, "--run", run]
    goes = start(recipe, *nodes)
    goes.send_signal(signal.SIGSTOP)  # older than the other, it will be the first rank's node; that one keeps the port
    stays = start(recipe, *nodes)

    def trains_on(ranks: list[int]) -> bool:
        """Return True if the run was started by these numbers of ranks in turn, and took five steps since."""
        begun = [one for one in lines(run, "events.jsonl") if one["event"] in ("started", "resumed")]
        assert len(begun) <= len(ranks), begun
        return [one["ranks"] for one in begun] == ranks and max(losses(run), default=0) >= begun[-1]["step"] + 5

    until(stays, lambda: (run / "metrics.jsonl").exists() and trains_on([1]))
    goes.send_signal(signal.SIGCONT)
    until(stays, lambda: trains_on([1, 2]))
    family = psutil.Process(goes.pid).children(recursive=True)
    goes.kill()  # the ranks of it go with it
    assert psutil.wait_procs(family, timeout=60)[1] == []
    goes.communicate()
    until(stays, lambda: trains_on([1, 2, 1]))
    stays.terminate()
    said = ended(stays)
    assert stays.returncode == 75 and "Traceback" not in said, said

    broken = losses(run)
    ranks.run(1, train_until, len(broken), str(recipe), str(alone))
    unbroken = losses(alone)
    assert sorted(broken) == list(range(1, len(broken) + 1))
    assert max(abs(broken[step][0] - unbroken[step][0]) for step in broken) < 1e-5
    ledger, other = ([one["sources"] for one in lines(folder, "ledger.jsonl")] for folder in (run, alone))
    assert ledger == other[: len(ledger)] and len(ledger) >= len(broken)
