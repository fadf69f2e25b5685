"""Files of object stores (s3://, gs://, http:// and whatever fsspec knows), copied once to a local folder."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from igla_mega.config.errors import ConfigError
from igla_mega.data.journal import Lock

_PIECE = 1 << 24
_PATIENCE_SECONDS = 6 * 3600.0


def is_remote(path: str | Path) -> bool:
    """Whether a path is the address of something that is not on this machine."""
    return "://" in str(path)


def cache_folder(asked: str | None) -> Path:
    """Where copies lie: as asked for, or `data` below $IGLA_CACHE or ~/.cache/igla_mega."""
    return Path(asked) if asked else Path(os.environ.get("IGLA_CACHE") or Path.home() / ".cache" / "igla_mega") / "data"


def local_dataset(address: str, cache: Path) -> str:
    """The prefix of a local copy of an indexed dataset.

    Raises:
        ConfigError: as `local_file`.
    """
    prefix = cache / _key(address) / Path(address).name
    for suffix in (".bin", ".idx", ".manifest.json"):
        _copy(f"{address}{suffix}", Path(f"{prefix}{suffix}"), needed=suffix != ".manifest.json")
    return str(prefix)


def local_files(addresses: Iterable[str | Path], cache: Path) -> list[str | Path]:
    """The same paths, those of object stores as local copies; `*` in an address stands for all that match.

    Raises:
        ConfigError: as `local_file`, or nothing matches.
    """
    paths: list[str | Path] = []
    for address in addresses:
        if not is_remote(address):
            paths.append(address)
            continue
        system, path = _system(str(address))
        found = sorted(system.glob(path)) if "*" in path else [path]
        if not found:
            raise ConfigError(f"{address}: no file of this pattern.\n  Mend the address.")
        for name in found:
            full = system.unstrip_protocol(name)
            paths.append(_copy(full, cache / _key(full) / Path(name).name))
    return paths


def _copy(address: str, target: Path, *, needed: bool = True) -> Path:
    """Copy what is not there yet, or has changed there; one process does, the others wait."""
    system, path = _system(address)
    try:
        there = system.exists(path)
        if not there and not needed:
            return target
        if not there:
            raise ConfigError(f"{address}: no such file.\n  Mend the address, or the rights to read it.")
        mark = repr((system.size(path), _version(system.info(path))))
        noted = target.with_name(target.name + ".copied")
        with Lock(target, patience_seconds=_PATIENCE_SECONDS):
            if target.is_file() and noted.is_file() and noted.read_text() == mark:
                return target
            partial = target.with_name(target.name + ".partial")
            with system.open(path, "rb") as source, open(partial, "wb") as copy:
                while piece := source.read(_PIECE):
                    copy.write(piece)
                copy.flush()
                os.fsync(copy.fileno())
            if partial.stat().st_size != system.size(path):
                raise ConfigError(f"{address}: the connection ended before the file did.\n  Run it again.")
            os.replace(partial, target)
            noted.write_text(mark)
        return target
    except OSError as error:
        raise ConfigError(f"{address}: cannot be copied to {target} ({error}).\n  Mend it and run again.") from None


def _version(info: dict[str, Any]) -> str:
    """What changes when a file of an object store does, as far as the store says."""
    return str(next((info[name] for name in ("ETag", "etag", "md5Hash", "mtime", "created") if name in info), ""))


def _system(address: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise ConfigError(f"{address}: fsspec is not installed.\n  pip install 'igla-mega[data]'") from None
    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{address}: cannot be read ({error}).\n  Install what it names.") from None


def _key(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()[:16]
