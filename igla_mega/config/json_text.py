"""JSON from anybody: whatever is wrong with it is a ValueError, as the callers expect."""

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: not UTF-8, not JSON, a number too long to read, or nested too deeply (json's own RecursionError).
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
