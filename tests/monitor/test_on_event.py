import json
import sys
import time

import pytest

from igla_mega.config.schema import Logging
from igla_mega.monitor import on_event
from igla_mega.monitor.on_event import Commands, notify, run

ENTRY = {"time": 1.5, "step": 7, "event": "failed", "message": "$(touch pwned); `id` | cat \0 \n\"'"}
WRITE = (
    "import json, os, sys\n"
    "names = ('IGLA_EVENT', 'IGLA_STEP', 'IGLA_MESSAGE', 'IGLA_TIME', 'IGLA_RUN', 'RANK')\n"
    "json.dump([sys.argv[2:], {name: os.environ.get(name) for name in names}], open(sys.argv[1], 'w'))"
)


def test_the_words_of_a_command_and_its_event_arrive_as_they_are_and_meet_no_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    words = ["$HOME", "*", "; touch pwned", "{step}", ""]
    run([sys.executable, "-c", WRITE, str(tmp_path / "out"), *words], ENTRY, tmp_path)
    given, variables = json.loads((tmp_path / "out").read_text())
    assert given == words and variables == {
        "IGLA_EVENT": "failed",
        "IGLA_STEP": "7",
        "IGLA_MESSAGE": ENTRY["message"].replace("\0", ""),
        "IGLA_TIME": "1.5",
        "IGLA_RUN": str(tmp_path),
        "RANK": None,
    }
    assert capsys.readouterr().err == "" and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["/nowhere/to/be/found"], "cannot be started"),
        (["/"], "cannot be started"),
        (["a\0b"], "cannot be started"),
        ([sys.executable, "-c", "raise SystemExit('it \\x1b[31mbroke')"], "ended with 1: it \\x1b[31mbroke"),
        ([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], "ended with -9"),
    ],
)
def test_a_command_that_fails_is_reported_and_ends_nothing(command, said, tmp_path, capsys):
    run(command, ENTRY, tmp_path)
    assert f"logging.on_event.failed: {command[0]!s}".split("\0")[0] in (err := capsys.readouterr().err) and said in err


def test_a_command_that_does_not_end_is_killed_with_what_it_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_event, "LIMIT_SECONDS", 0.2)
    alive = tmp_path / "alive"
    child = f"import time\ntime.sleep(2)\nopen({str(alive)!r}, 'w')"
    start = time.monotonic()
    run(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"],
        ENTRY,
        tmp_path,
    )
    assert "did not end within 0.2 s, and was killed" in capsys.readouterr().err
    assert time.monotonic() - start < 60 and not alive.exists()


def test_commands_run_in_their_order_and_the_last_one_is_waited_for(tmp_path):
    out = tmp_path / "out"
    append = f"import os; open({str(out)!r}, 'a').write(os.environ['IGLA_STEP'])"
    commands = Commands({"saved": (sys.executable, "-c", append)}, tmp_path)
    for step in (1, 2, 3):
        commands.event({"event": "saved", "step": step})
        commands.event({"event": "spike", "step": 9})
    commands.close()
    assert out.read_text() == "123"


def test_an_end_that_no_tracker_saw_is_notified(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "a.prom").write_text('igla_mega_step{run="x"} 3\nigla_mega_state{run="x",state="running"} 1\n')
    logging = Logging(prometheus=str(tmp_path / "a.prom"), on_event={"failed": (sys.executable, "-c", WRITE, str(out))})
    notify(logging, tmp_path, ENTRY)
    assert json.loads(out.read_text())[1]["IGLA_EVENT"] == "failed"
    text = (tmp_path / "a.prom").read_text()
    assert 'state="failed"} 1' in text and 'state="running"} 0' in text and 'igla_mega_step{run="x"} 3' in text
    notify(Logging(), tmp_path, ENTRY)
