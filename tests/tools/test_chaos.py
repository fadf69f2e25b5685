"""The chaos program: that it passes a run which survives being killed, and fails each that does not."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import chaos  # noqa: E402

# What `igla-mega train` does to a run folder, without a model: one process that may save or log wrongly.
TRAINER = """
import hashlib, json, os, pathlib, shutil, subprocess, sys, time
run, fault, steps, every = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
root = run / "checkpoints"
root.mkdir(parents=True, exist_ok=True)
shutil.rmtree(root / ".writing_", ignore_errors=True)
whole = sorted(root.glob("step_*/manifest.json"))
state, step = 1, 0
if whole:
    step = int(whole[-1].parent.name[5:])
    state = int((whole[-1].parent / "a.distcp").read_text().split()[0])
    if fault == "loses a save":
        step, state = 0, 1
    print(f"resuming at step {step}", flush=True)
for name in ("metrics.jsonl", "ledger.jsonl"):
    old = (run / name).read_text().splitlines() if (run / name).exists() else []
    kept = [line for line in old if line.endswith("}") and (fault == "logs twice" or json.loads(line)["step"] <= step)]
    (run / "new").write_text("".join(line + "\\n" for line in kept))
    os.replace(run / "new", run / name)
if fault == "leaves a child":
    subprocess.Popen(["sleep", "60"], start_new_session=True)
def save(folder):
    folder.mkdir(exist_ok=True)
    text = f"{state} " + "x" * 200_000
    with open(folder / "a.distcp", "w") as file:
        for at in range(0, len(text), 20_000):
            file.write(text[at : at + 20_000])
            file.flush()
            time.sleep(0.002)
    entry = {"bytes": len(text), "blake2b": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}
    (folder / ".metadata").touch()
    index = {"bytes": 0, "blake2b": hashlib.blake2b(b"", digest_size=16).hexdigest()}
    files = {"a.distcp": entry, ".metadata": index}
    (folder / "new").write_text(json.dumps({"format": 1, "files": files}))
    os.replace(folder / "new", folder / "manifest.json")
with open(run / "metrics.jsonl", "a") as metrics, open(run / "ledger.jsonl", "a") as ledger:
    while step < steps:
        step += 1
        state = (state * 1103515245 + 12345) % 2**31
        if fault == "forgets its state" and whole and step % 7 == 0:
            state += 1
        metrics.write(json.dumps({"step": step, "loss": state / 2**31, "grad_norm": 1.0}) + "\\n")
        metrics.flush()
        ledger.write(json.dumps({"step": step, "sources": state % 10}) + "\\n")
        ledger.flush()
        time.sleep(0.004)
        if step % every == 0 or step == steps:
            final, temporary = root / f"step_{step:08d}", root / ".writing_"
            if fault == "writes in place":
                temporary.mkdir(exist_ok=True)
                save(final)
                temporary.rmdir()
            else:
                save(temporary)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temporary, final)
"""


def tormented(folder: Path, fault: str, kills: int, seed: int = 0) -> chaos.Subject:
    script = folder / "trainer.py"
    script.write_text(TRAINER)
    subject = chaos.Subject(
        name=fault,
        command=[sys.executable, str(script), str(folder / "run"), "none", "60", "6"],
        run=folder / "run",
        reference=folder / "unbroken",
        steps=60,
        limit_seconds=30,
        start_seconds=0.2,
        silence_seconds=1.0,
    )
    chaos.unbroken(subject)
    subject.command[3] = fault
    chaos.torment(subject, kills, random.Random(seed), lambda subject: None)
    return subject


def test_a_run_that_survives_every_kill_is_passed(tmp_path):
    subject = tormented(tmp_path, "none", 8)
    assert subject.faults == [] and len(subject.kills) == 8
    assert {kill["moment"] for kill in subject.kills} >= {"a step", "a save"}
    assert "8 kills" in chaos.table([subject], 60.0) and chaos.summary([subject], 60.0)["sound"]


@pytest.mark.parametrize(
    "fault, words",
    [
        ("writes in place", "incomplete under its final name"),
        ("logs twice", "each once"),
        ("forgets its state", "differ"),
        ("loses a save", "resumed at step 0"),
        ("leaves a child", "left running"),
    ],
)
def test_a_run_that_does_not_survive_is_failed_and_the_fault_named(fault, words, tmp_path):
    # Of four kills none may fall within a save on a busy machine, and a fault that needs one is not seen.
    subject = tormented(tmp_path, fault, 8)
    assert any(words in one for one in subject.faults), subject.faults
    assert not chaos.summary([subject], 60.0)["sound"] and "wrong" in chaos.table([subject], 60.0)


def test_four_kills_of_a_real_run_leave_no_trace(tmp_path):
    words = ["--kills", "4", "--layouts", "distributed optimizer, two-level", "--json", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "chaos.py"), *words],
        capture_output=True,
        text=True,
        env={**chaos.os.environ, "PYTHONPATH": str(ROOT)},
        timeout=580,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 4 and found["sound"]
