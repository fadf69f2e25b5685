"""JSON from untrusted sources: every defect raises ValueError."""

import json
from pathlib import Path
from typing import Any

from igla_mega.config.files import read_bytes


def loads(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: not UTF-8, not JSON, a number with too many digits, or nested too deeply (RecursionError in json).
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read(path: str | Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        ValueError: as for `loads`.
        NotReadable, OSError: as for `files.read_bytes`.
    """
    return loads(read_bytes(path))
