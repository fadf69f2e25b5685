"""The test of nodes before a run: real ranks under real load, and figures that no machine here can have."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from test_cli import igla, refused

from igla_mega.config.errors import ConfigError
from igla_mega.doctor import measure, node_test
from igla_mega.doctor.measure import Report, _partners, ask_driver, clock_offset, measure_disk
from igla_mega.doctor.node_test import ON_CPU, Limits

ROOT = Path(__file__).resolve().parents[2]


def report(rank: int, node: str = "", device: str = "NVIDIA H200", **figures) -> Report:
    """A rank of a node of one H200, as it should be, but for the figures given."""
    healthy = {
        "matmul": 700e12, "copy": 4.2e12, "host": 55e9, "network": 45e9, "memory": 150e9, "memory free": 149e9,
        "clock": 1.9e9, "highest clock": 1.98e9, "disk": 2e9, "fsync": 0.002, "skew": 0.0, "skew error": 1e-4,
    }  # fmt: skip
    expected = {"matmul": 989e12, "copy": 4.8e12, "host": 64e9, "network": 50e9, "memory": 150e9}
    return Report(rank, node or f"gpu{rank}", device, False, {**healthy, **figures}, expected)


def bad_of(*reports: Report, limits: Limits | None = None) -> list[tuple[str, str]]:
    return [(bad.node, bad.what) for bad in node_test.verdicts(reports, limits or Limits())]


def test_nodes_that_reach_what_they_should_are_not_named():
    assert bad_of(*(report(rank) for rank in range(8))) == []


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"matmul": 420e12}, ["matrix products: 420 TFLOP/s", "below 560 TFLOP/s", "0.8 of its peers' 700 TFLOP/s"]),
        ({"copy": 1e12}, ["copies in its memory: 1 TB/s", "below 3.36 TB/s"]),
        ({"network": 12e9}, ["link to other machines: 12 GB/s", "below 36 GB/s"]),
        ({"host": 6e9}, ["copies from the machine's memory: 6 GB/s"]),
        ({"clock": 0.345e9}, ["clock under load: 345 MHz", "below 1.19 GHz"]),
        ({"memory free": 90e9}, ["memory: 90 GB of 150 GB free", "another process uses it"]),
        ({"memory": 75e9, "memory free": 75e9}, ["memory: 75 GB, the table has 150 GB"]),
        ({"disk": 3e6}, ["disk: 3 MB/s written, below 50 MB/s"]),
        ({"fsync": 4.0}, ["4.000 s to flush a small file, above 0.5 s"]),
        ({"skew": 7.0}, ["clock: 7.000 s", "ahead of the others, above 0.5 s"]),
        ({"skew": -7.0}, ["behind the others"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_node_alone_is_named_with_its_figure_and_the_limit(figures, words):
    found = bad_of(*(report(rank, **(figures if rank == 3 else {})) for rank in range(8)))
    assert [node for node, _ in found] == ["gpu3"]
    assert not [word for word in words if word not in found[0][1]], found


def test_all_nodes_are_held_to_the_table_where_all_are_slow():
    found = bad_of(*(report(rank, matmul=300e12) for rank in range(4)))
    assert [node for node, _ in found] == ["gpu0", "gpu1", "gpu2", "gpu3"]
    assert "below 494 TFLOP/s (0.5 of the table's 989 TFLOP/s" in found[0][1]


def test_a_clock_of_rank_0_that_is_wrong_is_laid_at_rank_0():
    # All offsets are from rank 0's clock, so that the others seem to be wrong.
    found = bad_of(report(0), *(report(rank, skew=5.0) for rank in range(1, 5)))
    assert [node for node, _ in found] == ["gpu0"] and "behind the others" in found[0][1]


def test_an_offset_within_its_own_error_is_no_fault():
    assert bad_of(report(0), report(1, skew=0.9, **{"skew error": 0.6})) == []


def test_limits_are_the_users_to_set():
    limits = node_test.parse_limits(["peers=0.5", "skew=10"], on_cpu=False)
    assert bad_of(report(0), report(1, matmul=500e12, skew=7.0), report(2), limits=limits) == []
    assert node_test.parse_limits([], on_cpu=True) == ON_CPU


def test_wrong_limits_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        node_test.parse_limits(["matmull=1", "disk=fast", "skew=-1", "copy=nan"], on_cpu=False)
    said = str(caught.value)
    assert "did you mean `matmul`" in said and "disk=fast: not a number above 0" in said and "skew=-1" in said
    assert "copy=nan" in said


@pytest.mark.parametrize(("count", "most"), [(2, 2), (3, 3), (4, 4), (7, 8), (8, 8), (1, 4)])
def test_in_a_tournament_all_meet_once_and_both_know_of_it(count, most):
    plans = [_partners(place, count, most) for place in range(count)]
    assert len({len(plan) for plan in plans}) == 1
    met = []
    for place, plan in enumerate(plans):
        for number, partner in enumerate(plan):
            if partner is not None:
                assert plans[partner][number] == place
                met.append((place, partner))
    assert sorted(met) == [(a, b) for a in range(count) for b in range(count) if a != b]


def _clock(shift: float) -> float:
    return time.time() + shift


def _offset(shifts: list[float]) -> tuple[float, float]:
    import torch.distributed as dist

    shift = shifts[dist.get_rank()]
    return clock_offset(lambda: _clock(shift))


def test_clocks_that_differ_are_measured_between_ranks_to_within_the_stated_error():
    shifts = [100.0, 100.0, 97.5]
    found = ranks.run(3, _offset, shifts)
    for (offset, error), shift in zip(found, shifts, strict=True):
        assert abs(offset - (shift - 100.0)) <= error + 1e-3
        assert error < 0.5


def _tested(folder: str, names: list[str], cores: list[int], clocks: list[float]) -> list[Report]:
    """Test this rank as one on a node, pinned to a core, at low priority where its core is to be shared."""
    import torch.distributed as dist

    rank = dist.get_rank()
    os.environ["SLURMD_NODENAME"] = names[rank]
    os.sched_setaffinity(0, {cores[rank]})
    if names[rank] == "slow":
        os.nice(15)
    return node_test.test(torch.device("cpu"), Path(folder), clock=lambda: _clock(clocks[rank]))


def test_a_node_that_shares_its_core_and_one_whose_clock_is_wrong_are_named_by_real_ranks(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(busy.pid, {cores[-1]})
        found = ranks.run(
            3, _tested, str(tmp_path), ["good", "late", "slow"], [cores[0], cores[0], cores[-1]], [0.0, -3.0, 0.0]
        )[0]
    finally:
        busy.send_signal(signal.SIGKILL)
        busy.wait()
    bad = node_test.verdicts(found, ON_CPU)
    assert any(entry.node == "slow" and entry.what.startswith("matrix products") for entry in bad), bad
    assert any(entry.node == "late" and "behind the others" in entry.what for entry in bad), bad
    assert not [entry for entry in bad if entry.node == "good" and "matrix" in entry.what], bad
    figures = found[0].figures
    assert {"matmul", "copy", "network", "all-reduce", "disk", "fsync", "memory"} <= set(
        figures
    ) and "link" not in figures
    assert list(tmp_path.iterdir()) == []
    said = node_test.text(found, bad)
    assert "3 nodes, 3 ranks, CPU" in said and "bad: slow (rank 2): matrix products" in said


def _beside(folders: list[str]) -> list[Report]:
    import torch.distributed as dist

    os.environ["SLURMD_NODENAME"] = f"node{dist.get_rank()}"
    measure.SHARED_SECONDS = 1
    return node_test.test(torch.device("cpu"), Path(folders[dist.get_rank()]))


def test_a_folder_that_is_not_shared_names_the_node_that_does_not_see_it(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    found = ranks.run(2, _beside, [str(tmp_path / "here"), str(tmp_path / "there")])[0]
    bad = node_test.verdicts(found, ON_CPU)
    assert [entry.node for entry in bad if "it is not shared" in entry.what] == ["node1"], bad
    assert not any(any((tmp_path / name).iterdir()) for name in ("here", "there"))


def test_what_nvidia_smi_says_is_held_to_the_gpu(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$1" in --id=GPU-abc) echo "1755, 1980, 55, 8, 16, 2";; *) exit 6;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = report(0)
    ask_driver(found, "abc")
    assert found.figures["clock"] == 1755e6 and found.figures["highest clock"] == 1980e6
    assert found.faults == [
        "memory: 2 uncorrectable errors since the driver started",
        "PCIe: 8 of 16 lanes in use: a riser or slot is loose",
    ]
    program.write_text('#!/bin/sh\necho "[N/A], [N/A], 55, 16, 16, [N/A]"\n')
    quiet = report(0)
    del quiet.figures["clock"], quiet.figures["highest clock"]
    ask_driver(quiet, "abc")
    assert not quiet.faults and "clock" not in quiet.figures and bad_of(quiet) == []
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(measure, "DRIVER_SECONDS", 0.2)
    ask_driver(quiet, "abc")
    assert quiet.faults == ["nvidia-smi: no answer in 0.2 s: the driver hangs"]


def test_a_folder_that_cannot_be_written_is_a_fault_of_the_node():
    found = report(0)
    measure_disk(found, Path("/proc"), 2**23)
    assert len(found.faults) == 1 and "cannot be written" in found.faults[0]
    assert bad_of(found)[0][0] == "gpu0"


def test_two_ranks_of_this_machine_are_tested_by_the_command_and_an_unreachable_limit_is_exit_code_1(tmp_path):
    done = igla("doctor", "--nproc", 2, "--run", tmp_path / "run", "--json", "--limit", "disk=1e15")
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["ranks"]) == 2 and answer["limits"]["disk"] == 1e15
    assert answer["ranks"][1]["figures"]["link"] > 0
    assert any("below 1 PB/s" in bad["what"] or "below 1e+03 TB/s" in bad["what"] for bad in answer["bad"])
    assert {row["what"] for row in answer["installed"]} >= {"apex", "transformer-engine", "flash-attn", "nvidia-dali"}
    assert not (tmp_path / "run").exists()


def test_the_listing_alone_puts_no_load_on_the_machine_and_says_that_all_is_well():
    done = igla("doctor", "--list")
    assert done.returncode == 0 and "megatron-core" in done.stdout and "matrix products" not in done.stdout


def test_a_wrong_limit_is_refused_before_anything_is_measured():
    assert "did you mean `skew`" in refused("doctor", "--limit", "skw=1")
