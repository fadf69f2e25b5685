import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.prepare.preprocess import Options, Settings, preprocess

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def kill_a_busy_worker(prefix: Path, killed: list[int]) -> None:
    """Kill the process that writes a part once it has finished a shard."""
    deadline = time.monotonic() + 60
    while not killed and time.monotonic() < deadline:
        for lock in prefix.parent.glob(f"{prefix.name}_*.lock"):
            journal = lock.with_suffix(".journal")
            try:
                pid = int(lock.read_text().split()[1])
                if '"documents"' in journal.read_text() and psutil.Process(pid).is_running():
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return
            except (OSError, IndexError, ValueError, psutil.Error):
                continue
        time.sleep(0.01)


@pytest.mark.slow
def test_two_workers_one_of_them_killed_make_the_bytes_of_one(cluster, texts, tokenizer, tmp_path):
    from igla_mega.prepare.ray import Cluster, preprocess_on_ray

    files = []
    for i in range(4):
        files.append(tmp_path / f"{i}.jsonl")
        files[-1].write_text(
            "".join(json.dumps({"text": f"{i} {n} {text}"}) + "\n" for n, text in enumerate(texts * 20))
        )
    preprocess(files, tmp_path / "whole", tokenizer, settings=Settings(progress=False))
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_busy_worker, args=(tmp_path / "set", killed))
    killer.start()
    preprocess_on_ray(
        files, tmp_path / "set", tokenizer.path, Options(), Settings(shard_bytes=1, progress=False), Cluster(parts=4)
    )
    killer.join()
    assert killed, "no worker was killed in mid-run"
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"set{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not list(tmp_path.glob("set_0*"))


@pytest.mark.slow
def test_what_a_part_refuses_is_told_without_a_traceback(cluster, tokenizer, tmp_path):
    from igla_mega.prepare.ray import Cluster, preprocess_on_ray

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 5}\n{"text": "two"}\n')
    with pytest.raises(ConfigError, match="`text` is a JSON number, not a string"):
        preprocess_on_ray(
            [tmp_path / "a.jsonl"],
            tmp_path / "set",
            tokenizer.path,
            Options(),
            Settings(progress=False),
            Cluster(parts=2),
        )
