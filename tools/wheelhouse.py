"""Fill a folder with the wheels that `make gpu-check` needs on a machine without a network, except torch.

Starting with pyproject's dependencies and its extra `gpu-check`, the requirements of every wheel are followed until
none is missing; versions are those of this environment where possible. The folder installs with
`pip install --no-index --find-links`. Packages in the --have file (a `pip freeze` of the other machine) are left out.
"""

import argparse
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
EXTRA = "gpu-check"
NOT_CARRIED = ("torch", "triton", "nvidia-", "cuda-")
"""Names, or prefixes ending in `-`, of packages that come with the other machine's CUDA torch."""
GLIBC = ("2_34", "2_28", "2_27", "2_24", "2_17", "2_12", "2_5")
"""Versions of glibc whose manylinux wheels are accepted; `pip download` accepts only those that are named."""
MIB = 2**20


def carried(name: str) -> bool:
    """Return True if a package belongs in the folder."""
    return not any(name == one or (one.endswith("-") and name.startswith(one)) for one in NOT_CARRIED)


def project_requirements() -> list[Requirement]:
    """Return the project's own requirements, with those of its build."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    texts = [*content["build-system"]["requires"], *project["dependencies"], *project["optional-dependencies"][EXTRA]]
    return [Requirement(text) for text in texts]


def needs_of(wheel: Path, extras: Iterable[str], python: str) -> Iterator[Requirement]:
    """Yield the requirements in a wheel's metadata that apply on Linux with the given Python."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        found = Parser().parsestr(archive.read(name).decode())
    base: dict[str, str] = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}  # type: ignore[dict-item]
    base |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    for text in found.get_all("Requires-Dist") or []:
        need = Requirement(text)
        if need.marker is None or any(need.marker.evaluate({**base, "extra": extra}) for extra in ("", *extras)):
            yield need


def wheel_of(folder: Path, name: str) -> Path | None:
    """Return the folder's wheel of a package, or None."""
    return next((w for w in folder.glob("*.whl") if canonicalize_name(w.name.split("-")[0]) == name), None)


def download(needs: Iterable[Requirement], folder: Path, python: str, platform: str) -> None:
    """Download a wheel of each requirement, in the version of this environment if it is allowed."""
    texts = []
    for need in needs:
        texts.append(f"{need.name}{need.specifier}")
        with suppress(metadata.PackageNotFoundError):
            here = metadata.version(need.name)
            if need.specifier.contains(here, prereleases=True):
                texts[-1] = f"{need.name}=={here}"
    platforms = [f"manylinux_{glibc}_{platform}" for glibc in GLIBC] + [f"manylinux2014_{platform}"]
    command = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), "--python-version", python, "--implementation", "cp"]
    for one in platforms:
        command += ["--platform", one]
    if subprocess.run([*command, *texts], check=False).returncode:
        raise SystemExit(
            f"wheelhouse: pip did not fetch {', '.join(texts)} into {folder} (see its output above).\n"
            "  It needs an index: a network, or PIP_INDEX_URL or PIP_FIND_LINKS of a mirror."
        )


def fill(folder: Path, python: str, platform: str, have: set[str]) -> list[str]:
    """Download until every requirement has a wheel; return a line for each that the folder's version does not meet."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [(need, "igla-mega") for need in project_requirements()]
    seen: set[tuple] = set()
    breaches: list[str] = []
    while waiting:
        found = {canonicalize_name(need.name): need for need, _ in waiting}
        wanted = {name: need for name, need in found.items() if name not in have and carried(name)}
        if missing := [need for name, need in wanted.items() if wheel_of(folder, name) is None]:
            download(missing, folder, python, platform)
        following: list[tuple[Requirement, str]] = []
        for need, by in waiting:
            name = canonicalize_name(need.name)
            key = (name, tuple(sorted(need.extras)), str(need.specifier))
            if name not in wanted or key in seen:
                continue
            seen.add(key)
            wheel = wheel_of(folder, name)
            assert wheel is not None, "pip has just downloaded it"
            version = wheel.name.split("-")[1]
            if not need.specifier.contains(version, prereleases=True):
                breaches.append(f"{by} needs {need}, but the folder has {version}")
            following += [(more, name) for more in needs_of(wheel, need.extras, python)]
        waiting = following
    return breaches


def main() -> int:
    """Fill the folder and print its size; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "wheelhouse")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--platform", default="x86_64")
    parser.add_argument("--have", type=Path, help="a `pip freeze` of the other machine")
    parser.add_argument("--most-mib", type=float, help="exit with 1 if the folder is larger")
    args = parser.parse_args()
    try:
        lines = args.have.read_text().splitlines() if args.have else []
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"wheelhouse: --have {args.have} cannot be read ({error}).") from None
    have: set[str] = {canonicalize_name(re.split(r"[=@<> ]", line.strip())[0]) for line in lines if line.strip()}
    breaches = fill(args.out, args.python, args.platform, have)
    (args.out / "python").write_text(args.python + "\n")
    wheels = sorted(args.out.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
    total = sum(wheel.stat().st_size for wheel in wheels) / MIB
    largest = ", ".join(f"{w.name.split('-')[0]} {w.stat().st_size / MIB:.1f}" for w in wheels[:6])
    print(f"{args.out}: {len(wheels)} wheels for Python {args.python}, {total:.1f} MiB ({largest})")
    for breach in breaches:
        print(f"  {breach}", file=sys.stderr)
    too_large = args.most_mib is not None and total > args.most_mib
    if too_large:
        print(
            f"  larger than {args.most_mib:g} MiB. Give --have with a `pip freeze` of the other machine.",
            file=sys.stderr,
        )
    return 1 if breaches or too_large else 0


if __name__ == "__main__":
    sys.exit(main())
