import errno
import json
import os
import random

import pytest

from igla_mega.data.json_lines import Lines, missing_steps, ranges, rewind


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rewind_drops_later_steps_and_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1}\n{"step": 2}\n{"step": 2, "validation_loss": {"web": 3.0}}\n{"step": 3}\n{"step": 4, "lo'
    )
    rewind(path, 2)
    assert written(path) == [{"step": 1}, {"step": 2}, {"step": 2, "validation_loss": {"web": 3.0}}]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewind_to_the_start_empties_and_a_missing_file_stays_missing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rewind(path, 5)
    assert not path.exists()
    path.write_text('{"step": 1}\n')
    rewind(path, 0)
    assert path.read_text() == ""


def test_rewind_passes_over_lines_that_are_no_objects(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n4\n[]\n\x00\x00\n{"step": 2}\n')
    rewind(path, 2)
    assert written(path) == [{"step": 1}, {"step": 2}]


def test_a_file_without_a_fault_is_not_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    before = path.stat()
    assert (
        rewind(path, 2) == [] and path.stat().st_ino == before.st_ino and path.stat().st_mtime_ns == before.st_mtime_ns
    )


def test_what_a_power_cut_leaves_is_removed_with_a_message_and_nothing_else_is_lost(tmp_path):
    """Of a file of whole lines any range becomes NUL bytes, and the end is cut anywhere: every untouched line stays."""
    path, generator = tmp_path / "metrics.jsonl", random.Random(5)
    lines = [json.dumps({"step": step, "loss": step / 7}).encode() + b"\n" for step in range(1, 13)]
    whole = b"".join(lines)
    starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
    for _ in range(300):
        first, end = sorted(generator.sample(range(len(whole) + 1), 2))
        last = generator.choice([len(whole), generator.randrange(1, len(whole) + 1)])
        content = (whole[:first] + b"\0" * (end - first) + whole[end:])[:last] + b"\0" * generator.choice([0, 0, 50])
        path.write_bytes(content)
        said = rewind(path, None)
        # The line end itself is not needed: what was written of a line before it is whole.
        intact = [
            json.loads(line)
            for line, start in zip(lines, starts, strict=True)
            if start + len(line) - 1 <= last and (start >= end or start + len(line) - 1 <= first)
        ]
        assert written(path) == intact
        pieces = [piece for part in content.split(b"\n") for piece in part.split(b"\0") if piece.strip()]
        assert bool(said) == (b"\0" in content or len(pieces) > len(intact))
        assert all("metrics.jsonl: removed" in message for message in said)
        assert rewind(path, None) == [], "once is enough"


@pytest.mark.parametrize(
    ("metrics", "ledger", "skipped", "said"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], [], []),
        ([1, 2, 3], [1, 2, 3, 4], [], ["metrics.jsonl has no line of step 4"]),
        ([1, 4], [1, 2, 4], [], ["metrics.jsonl has no line of step 2, 3", "ledger.jsonl has no line of step 3"]),
        ([1, 2, 4], [1, 2, 3, 4], [3], []),
        ([3, 4], [3, 4], [], []),
        ([], [1, 2, 3, 4], [], ["metrics.jsonl has no line of step 1 to 4"]),
        (None, None, [], ["metrics.jsonl has no line of step 1 to 4", "ledger.jsonl has no line of step 1 to 4"]),
    ],
)
def test_steps_without_a_line_are_named(metrics, ledger, skipped, said, tmp_path):
    for name, key, steps in (("metrics", "loss", metrics), ("ledger", "sources", ledger)):
        if steps is not None:
            text = "".join(json.dumps({"step": step, key: 1}) + "\n" for step in steps)
            (tmp_path / f"{name}.jsonl").write_text(text + '{"step": 3, "validation_loss": {}}\n')
    assert list(missing_steps(tmp_path, 4, skipped)) == said


def test_nothing_is_missing_before_the_first_step(tmp_path):
    assert list(missing_steps(tmp_path, 0, [])) == []


def test_many_ranges_are_cut(tmp_path):
    assert ranges([7, 0, 1, 2, 3]) == "0 to 3, 7" and ranges([4, 5]) == "4, 5"
    (tmp_path / "ledger.jsonl").write_text("".join(f'{{"step": {n}, "sources": {{}}}}\n' for n in range(1, 999, 2)))
    [_, said] = missing_steps(tmp_path, 999, [])
    assert said.startswith("ledger.jsonl has no line of step 2, 4, 6") and said.endswith(" ...") and len(said) < 260


def test_lines_are_on_the_disk_after_a_sync(tmp_path, monkeypatch):
    synced, really = [], os.fsync

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    file = Lines(tmp_path / "metrics.jsonl")
    file.sync()
    assert synced == [] and not (tmp_path / "metrics.jsonl").exists(), "no line, no file"
    file.add({"step": 1})
    file.sync()
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_ino]
    file.close()


def test_a_sync_names_the_file_that_a_full_disk_does_not_take(tmp_path, monkeypatch):
    def write(*_):
        raise OSError(28, "No space left on device")

    file = Lines(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(os, "write", write)
    file.add({"step": 1})
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        file.sync()
    monkeypatch.undo()
    file.sync()
    assert written(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_lines_that_a_full_disk_does_not_take_are_written_when_it_takes_them(tmp_path, monkeypatch):
    really, full = os.write, False

    def write(descriptor: int, content: bytes) -> int:
        if full and len(content) < 12:
            raise OSError(28, "No space left on device")
        return really(descriptor, content[:12] if full else content)

    monkeypatch.setattr(os, "write", write)
    file = Lines(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        full = step in (2, 3)
        file.add({"step": step})
    file.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_lines_that_still_wait_are_written_when_the_file_is_closed(tmp_path, monkeypatch):
    lines = Lines(tmp_path / "events.jsonl")
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        lines.add({"step": 1})
        lines.add({"step": 2})
    lines.close()
    assert (tmp_path / "events.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_file_that_cannot_be_made_yet_is_made_when_it_can(tmp_path):
    file = Lines(tmp_path / "later" / "events.jsonl")
    file.add({"step": 1})
    (tmp_path / "later").mkdir()
    file.add({"step": 2})
    assert [json.loads(line)["step"] for line in (tmp_path / "later/events.jsonl").read_text().splitlines()] == [1, 2]
