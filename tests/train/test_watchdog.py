"""A run that is stuck: the rank that the others wait for is named, with its place and stack, within seconds."""

import ctypes
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import small_run
import tiny
import torch
import torch.distributed as dist
from small_run import lines, write_recipe

from igla_mega.checkpoint import remote, store
from igla_mega.checkpoint.progress import Progress, Retention
from igla_mega.engine.heartbeat import Heartbeat, followed
from igla_mega.train import loop, stragglers, watchdog

HANG_SECONDS = 3
AT = "training, step 3, micro-batch 1, forward"


class Stuck:
    """Has a rank stop moving in a step, in one of several ways."""

    def __init__(self, rank: int, step: int, way: str):
        self.rank, self.step, self.way = rank, step, way

    def __call__(self) -> None:
        if int(os.environ["RANK"]) != self.rank:
            return
        take = loop.train_step

        def stuck_step(engine, batches, *, step, **given):
            if step + 1 == self.step:
                layer = next(m for n, m in engine.chunks[0].named_modules() if n.endswith("layers.1.mlp"))
                layer.register_forward_pre_hook(lambda *_: getattr(self, self.way)())
            return take(engine, batches, step=step, **given)

        loop.train_step = stuck_step

    def sleeps_for_ever(self):
        time.sleep(1000)

    def loops_for_ever(self):
        while True:
            pass

    def is_stopped(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def holds_the_interpreter(self):
        ctypes.PyDLL(None).sleep(1000)  # unlike CDLL it keeps the interpreter's lock

    def calls_another_collective(self):
        dist.barrier()

    def is_killed(self):
        os.kill(os.getpid(), signal.SIGKILL)


def stuck(way: str, layout: dict, rank: int, tmp_path) -> tuple[str, str]:
    """The report of the run, and how each rank ended."""
    recipe = write_recipe(tmp_path, distributed={**layout, "hang_seconds": HANG_SECONDS, "timeout_seconds": 300})
    start = time.monotonic()
    with pytest.raises(ranks.RankFailed) as failed:
        small_run.train(2, recipe, tmp_path / "run", Stuck(rank, 3, way))
    print(f"{way}: {time.monotonic() - start:.1f} s")
    [report] = (tmp_path / "run/hang").glob("report_*.txt")
    return report.read_text(), str(failed.value)


@pytest.mark.parametrize(
    ("way", "rank", "words"),
    [
        ("sleeps_for_ever", 1, ["All wait for rank 1", "time.sleep(1000)", "in all_reduce", AT]),
        ("loops_for_ever", 1, ["All wait for rank 1", "loops_for_ever", "while True:", AT]),
        ("is_stopped", 1, ["Rank 1 (process", "its process is stopped (SIGSTOP", "rank 1: last seen: "]),
        (
            "holds_the_interpreter",
            0,
            ["Rank 0 (process", "native code holds its interpreter lock", "holds_the_interpreter"],
        ),
    ],
)
def test_a_rank_that_stands_still_is_named_with_its_place_and_stack_and_every_rank_ends(way, rank, words, tmp_path):
    said, ends = stuck(way, {}, rank, tmp_path)
    assert "the run is stuck: no progress for" in said
    assert [word for word in words if word not in said] == [], said
    assert f"rank {1 - rank}: ended with {watchdog.EXIT_CODE}" in ends
    assert f"rank {rank}: ended with" in ends and "gave no answer" not in ends
    [event] = [one for one in lines(tmp_path / "run", "events.jsonl") if one["event"] == "hang"]
    assert event["step"] in (2, 3) and event["message"] == said.splitlines()[0]


def test_ranks_in_different_collectives_are_told_apart(tmp_path):
    said, ends = stuck("calls_another_collective", {"tensor_parallel": 2}, 1, tmp_path)
    assert "Ranks are in different collectives" in said and "barrier" in said and "calls_another_collective" in said
    assert f"rank 0: ended with {watchdog.EXIT_CODE}" in ends


def test_a_rank_that_is_killed_inside_a_step_is_named_by_the_one_that_waits(tmp_path):
    recipe = write_recipe(tmp_path, distributed={"hang_seconds": HANG_SECONDS})
    with pytest.raises(ranks.RankFailed) as failed:
        small_run.train(2, recipe, tmp_path / "run", Stuck(1, 3, "is_killed"), mark=tmp_path / "said")
    assert "rank 1: ended with -9" in str(failed.value)
    said = (tmp_path / "said_0").read_text()
    assert "RuntimeError: rank 1 (process" in said and "is gone" in said and "training, step 3" in said


def slow_layers():
    loop.train_step = slowed(loop.train_step)


def slowed(take):
    def slow_step(engine, batches, **given):
        for module in engine.chunks[0].modules():
            if type(module).__name__ == "TransformerLayer":
                hook = module.register_forward_pre_hook(lambda *_: time.sleep(0.7))
        try:
            return take(engine, batches, **given)
        finally:
            hook.remove()

    return slow_step


def test_a_step_that_takes_long_layer_by_layer_is_left_alone(tmp_path):
    recipe = write_recipe(tmp_path, distributed={"hang_seconds": 2}, training={"batch_size": 8, "total_steps": 2})
    small_run.train(2, recipe, tmp_path / "run", slow_layers)
    assert sorted(small_run.losses(tmp_path / "run")) == [1, 2]


def test_a_peer_that_has_said_why_it_ends_is_not_looked_for(monkeypatch):
    dog = object.__new__(watchdog.Watchdog)
    dog.hang_seconds, dog.interval, dog.world_size = 60, 5.0, 2
    signs = [json.dumps(sign(0, state="failed: no such file")), json.dumps(sign(1))]
    dog._store = SimpleNamespace(multi_get=lambda _: signs)
    monkeypatch.setattr(watchdog.time, "sleep", lambda _: pytest.fail("it waited"))
    assert dog._lost_peer() is None


def save_with_a_slow_store(recipe, folder: str) -> tuple[dict, int]:
    engine, _ = tiny.engine(recipe)
    heartbeat, alive = Heartbeat(), []
    with followed(heartbeat):
        there = remote.Remote(f"file://{folder}/bucket")
        writer = store.CheckpointWriter(Path(folder, "run"), engine.mesh, Retention(1), asynchronous=True, remote=there)
        before, put = dict(heartbeat.issued), there.put
        there.put = lambda *args: (time.sleep(1.2), put(*args))
        writer.save(engine.states(), Progress(step=1), "name: tiny\n")
        outcomes = writer.finish(alive=lambda: alive.append(1))
    assert [(one.where, one.error) for one in outcomes] == [("shared", None), ("remote", None)]
    return {group: count - before.get(group, 0) for group, count in heartbeat.issued.items()}, len(alive)


def test_what_savers_wait_for_is_not_the_training_threads_and_slow_copies_are_signs_of_life(tmp_path):
    [(issued, alive)] = ranks.run(1, save_with_a_slow_store, tiny.recipe(), str(tmp_path))
    assert not any(issued.values()) and alive >= 2


def sign(rank: int, *, waiting=True, collective=("all_reduce", "0", 5), issued=None, state="") -> dict:
    place = {"task": "training", "step": 3, "phase": "forward", "micro_batch": 1, "layer": 2}
    return {
        "rank": rank,
        "waiting": waiting,
        "collective": collective,
        "issued": issued or {"0": 5},
        "state": state,
        **place,
    }


def test_of_ranks_outside_any_collective_the_one_behind_is_odd():
    # On an accelerator the host waits for the device, inside no collective.
    signs = [sign(0, waiting=False), sign(1, waiting=False, issued={"0": 4}), sign(2, waiting=False)]
    odd, _ = watchdog.odd_ones(signs)
    assert [one["rank"] for one in odd] == [1]


def test_when_all_are_in_the_same_collective_the_network_is_named():
    odd, why = watchdog.odd_ones([sign(rank) for rank in range(4)])
    assert odd == [] and "network" in why


def count_collectives() -> dict:
    heartbeat = Heartbeat()
    with followed(heartbeat):
        tensor = torch.ones(3)
        dist.all_reduce(tensor)
        dist.all_reduce(tensor, async_op=True).wait()
        if dist.get_rank() == 0:
            dist.send(tensor, 1)
        else:
            dist.recv(tensor, 0)
    dist.all_reduce(tensor)
    return heartbeat.where()


def test_a_pulse_counts_collectives_and_knows_the_last():
    for rank, where in enumerate(ranks.run(2, count_collectives)):
        group = where["collective"][1]
        assert where["issued"] == {group: 2} and where["collective"][0] == ("send", "recv")[rank]
        assert not where["waiting"]


def slow_rank(rank: int):
    if int(os.environ["RANK"]) == rank:
        loop.train_step = slowed(loop.train_step)


def test_a_rank_that_is_slower_than_the_rest_is_named_once(tmp_path):
    recipe = write_recipe(
        tmp_path,
        distributed={"tensor_parallel": 2, "straggler_every": 2},
        training={"learning_rate": 1e-2, "batch_size": 2, "total_steps": 4},
    )
    said = small_run.train(2, recipe, tmp_path / "run", slow_rank, 1)[0]
    assert said.count("rank 1 is slow") == 1 and "rank 0 is slow" not in said
    [event] = [one for one in lines(tmp_path / "run", "events.jsonl") if one["event"] == "straggler"]
    assert event["step"] == 2
    written = [
        one["rank_step_seconds"] for one in lines(tmp_path / "run", "metrics.jsonl") if "rank_step_seconds" in one
    ]
    assert len(written) == 2 and all(own[1] > 1.4 > own[0] for own in written)


def test_above_64_ranks_the_times_are_summed_up():
    seconds = [1.0] * 99 + [3.0]
    assert stragglers.summary(seconds) == {"min": 1.0, "median": 1.0, "max": 3.0, "slowest_rank": 99}
    assert stragglers.slower(seconds, 1.5) == [99] and stragglers.slower([1.0, 2.0], 1.5) == [1]


def test_a_hang_is_notified_once_it_is_recorded_and_before_the_process_ends(tmp_path, monkeypatch):
    dog, said = object.__new__(watchdog.Watchdog), []
    dog.run_dir, dog.folder, dog.heartbeat = tmp_path, tmp_path / watchdog.HANG, Heartbeat(step=3)
    dog._reported, dog.notify = None, lambda entry: said.append(("notified", entry["event"], entry["step"]))
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: said.append(code))
    dog._end([])
    dog._report("the run is stuck: no progress for 60 s.")
    dog._end([])
    assert said == [76, ("notified", "hang", 3), 76]
    assert [one["event"] for one in lines(tmp_path, "events.jsonl")] == ["hang"]
