"""Fuzz the readers for a given time: new examples of the tests in tests/fuzz each round, then guided by coverage.

usage: fuzz.py [SECONDS]                        all (default 600): half by hypothesis, half by atheris if installed
       fuzz.py FILE.py::TEST SECONDS [CRASH]    one test by atheris; with a CRASH file of it, only that input
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOUND = ROOT / "fuzz-found"
"""Folder of the inputs that broke a reader."""


def main() -> int:
    """Fuzz everything, or one test; return the exit code."""
    words = sys.argv[1:]
    if words and "::" in words[0]:
        return guided(words[0], float(words[1]), words[2:])
    seconds = float(words[0]) if words else 600.0
    failed = by_rounds(seconds / 2)
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed (it has wheels for Linux only): hypothesis gets the other half too")
        return failed or by_rounds(seconds / 2, first_seed=1_000_000)
    files = sorted((ROOT / "tests" / "fuzz").glob("test_*.py"))
    targets = [f"{file.name}::{name}" for file in files for name in of(file)]
    for target in targets:
        share = max(5.0, seconds / 2 / len(targets))
        print(f"== {target}: {share:.0f} s guided by coverage", flush=True)
        done = subprocess.run([sys.executable, __file__, target, str(share)], cwd=ROOT, check=False)
        failed = failed or done.returncode
    return failed


def by_rounds(seconds: float, first_seed: int = 1) -> int:
    """Run pytest with one seed after another; the printed seed of a failing round reproduces it."""
    end, seed = time.monotonic() + seconds, first_seed
    while time.monotonic() < end:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/fuzz", f"--hypothesis-seed={seed}"]
        print(f"== FUZZ_PROFILE=long {' '.join(command[1:])}", flush=True)
        left = max(end - time.monotonic(), 30.0)
        try:
            if code := subprocess.run(
                command, cwd=ROOT, env={**os.environ, "FUZZ_PROFILE": "long"}, timeout=left, check=False
            ).returncode:
                return code
        except subprocess.TimeoutExpired:
            return 0
        seed += 1
    return 0


def of(file: Path) -> list[str]:
    """Return the names of the tests in a file that take drawn examples."""
    module = loaded(file)
    return [name for name, test in vars(module).items() if name.startswith("test_") and hasattr(test, "hypothesis")]


def loaded(file: Path):
    """Import a test file."""
    import importlib.util

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def guided(target: str, seconds: float, crash: list[str]) -> int:
    """Fuzz one test with atheris, which instruments igla_mega on import."""
    import atheris

    file, name = target.split("::")
    with atheris.instrument_imports(include=["igla_mega"]):
        module = loaded(ROOT / "tests" / "fuzz" / file)
    FOUND.mkdir(exist_ok=True)
    options = [f"-max_total_time={int(seconds)}", f"-artifact_prefix={FOUND}/{name}-", "-rss_limit_mb=6000"]
    test = getattr(module, name).hypothesis.fuzz_one_input
    again = f"to reproduce: {sys.executable} tools/fuzz.py {target} {int(seconds)} CRASH, a file of {FOUND}"

    def one(data: bytes) -> None:
        try:
            test(data)
        except BaseException:
            print(again, flush=True)
            raise

    atheris.Setup([sys.argv[0], *options, *crash], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
