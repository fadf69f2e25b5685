import json

from report_runs import append, train_entry

from igla_mega.report import lines
from igla_mega.report.history import History
from igla_mega.report.lines import Lines


def read(folder):
    found = History(folder)
    found.update()
    return found


def test_each_read_continues_where_the_last_one_stopped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    followed = Lines(path)
    assert list(followed.new()) == [] and not followed.replaced()
    append(path, {"step": 1}, {"step": 2})
    assert list(followed.new()) == [{"step": 1}, {"step": 2}]
    append(path, {"step": 3})
    assert list(followed.new()) == [{"step": 3}] and not followed.replaced()
    path.write_text("")
    assert followed.replaced()


def test_a_line_being_written_is_taken_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = json.dumps(train_entry(1)) + "\n"
    path.write_text(line[:40])
    found = read(tmp_path)
    assert not found.metrics.steps and any("incomplete" in problem for problem in found.problems())
    with open(path, "a") as file:
        file.write(line[40:])
    found.update()
    assert list(found.metrics.steps) == [1] and found.problems() == []


def test_a_line_without_end_is_skipped_without_being_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 12)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 1 << 10)
    junk = "x" * 50_000
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(train_entry(1))}\n{junk}\n{json.dumps(train_entry(2))}\n")
    found = read(tmp_path)
    assert list(found.metrics.steps) == [1, 2]
    assert len(found._lines["metrics.jsonl"]._tail) == 0 and "longer than" in found.problems()[0]
