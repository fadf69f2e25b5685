"""Copy files from object stores (s3://, gs://, http://, any protocol of fsspec) once to a local folder."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import no_follow, read_text, write_text
from igla_mega.data.journal import Lock

_PIECE = 1 << 24
"""Bytes per read."""
_PATIENCE_SECONDS = 6 * 3600.0
"""Maximum time to wait for another process that copies the same file."""


def is_remote(path: str | Path) -> bool:
    """Return True if a path is a URL, not a local path."""
    return "://" in str(path)


def cache_folder(configured: str | None) -> Path:
    """Return the folder of the copies: the configured one, or `data` in $IGLA_CACHE or ~/.cache/igla_mega."""
    if configured:
        return Path(configured)
    return Path(os.environ.get("IGLA_CACHE") or Path.home() / ".cache" / "igla_mega") / "data"


def local_dataset(address: str, cache: Path) -> str:
    """Copy an indexed dataset if necessary, and return the prefix of the local copy.

    Raises:
        ConfigError: a file is missing or cannot be copied.
    """
    prefix = cache / _key(address) / Path(address).name
    for suffix in (".bin", ".idx", ".manifest.json"):
        _copy(f"{address}{suffix}", Path(f"{prefix}{suffix}"), needed=suffix != ".manifest.json")
    return str(prefix)


def local_files(addresses: Iterable[str | Path], cache: Path) -> list[str | Path]:
    """Return the paths with every remote one replaced by its local copy; `*` in an address expands to all matches.

    Raises:
        ConfigError: nothing matches, or a file is missing or cannot be copied.
    """
    paths: list[str | Path] = []
    for address in addresses:
        if not is_remote(address):
            paths.append(address)
            continue
        system, path = _system(str(address))
        found = sorted(system.glob(path)) if "*" in path else [path]
        if not found:
            raise ConfigError(f"{address}: no file matches this pattern.\n  Correct the address.")
        for name in found:
            full = system.unstrip_protocol(name)
            paths.append(_copy(full, cache / _key(full) / Path(name).name))
    return paths


def _copy(address: str, target: Path, *, needed: bool = True) -> Path:
    """Copy a file that is missing locally or has changed remotely; one process copies while the others wait.

    Args:
        needed: False if the file may be missing; the target is then returned without a copy.
    """
    system, path = _system(address)
    try:
        exists = system.exists(path)
        if not exists and not needed:
            return target
        if not exists:
            raise ConfigError(f"{address}: no such file.\n  Correct the address or its read permissions.")
        # Size and version of the remote file, stored next to the copy: a later run copies again if they differ.
        mark = repr((system.size(path), _version(system.info(path))))
        noted = target.with_name(target.name + ".copied")
        with Lock(target, patience_seconds=_PATIENCE_SECONDS):
            if target.is_file() and noted.is_file() and read_text(noted) == mark:
                return target
            partial = target.with_name(target.name + ".partial")
            with system.open(path, "rb") as source, open(partial, "wb", opener=no_follow) as copy:
                while piece := source.read(_PIECE):
                    copy.write(piece)
                copy.flush()
                os.fsync(copy.fileno())
            # Some stores end a broken connection like an end of file: only the size reveals it.
            if partial.stat().st_size != system.size(path):
                raise ConfigError(f"{address}: the connection ended before the end of the file.\n  Run again.")
            os.replace(partial, target)
            write_text(noted, mark)
        return target
    except OSError as error:
        raise ConfigError(
            f"{address}: cannot be copied to {target} ({error}).\n  Fix the cause and run again."
        ) from None


def _version(info: dict[str, Any]) -> str:
    """Return a value that changes with the file's content: its ETag, MD5 or time, or "" if the store reports none."""
    return str(next((info[name] for name in ("ETag", "etag", "md5Hash", "mtime", "created") if name in info), ""))


def _system(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address and the path within it."""
    try:
        import fsspec
    except ImportError:
        raise ConfigError(f"{address}: fsspec is not installed.\n  pip install 'igla-mega[data]'") from None
    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{address}: cannot be read ({error}).\n  Install the package it names.") from None


def _key(address: str) -> str:
    """Return the name of an address's folder in the cache."""
    return hashlib.sha256(address.encode()).hexdigest()[:16]
