"""Notations of numbers in recipes (`4M tokens`, `140B`, `auto`) and the ranges shared by fields."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, WithJsonSchema, WrapValidator
from pydantic_core import PydanticCustomError

BATCH_FORMS = "a number of sequences (`128`) or of tokens (`512K tokens`, `4M tokens`; K is 2^10, M is 2^20)"
BYTE_FORMS = "a size (`8 GiB`, `512 MiB`) or a number of bytes"
TOKEN_FORMS = "a number of tokens: `140B`, `1.5T`, `200K` (K, M, B, T are powers of 1000) or a whole number"

MOST = 2**63 - 1
"""Maximum number of tokens or bytes, the largest signed 64-bit integer."""
MOST_COUNT = 2**40
"""Maximum of every other whole number. A product of several still fits into a float."""
MOST_NUMBER = 1e30
"""Maximum of numbers with a fraction: their squares, and sums over all sources, stay finite."""
SECONDS_OF_A_YEAR = 31_536_000
"""Maximum of waiting times: timeouts of torch and of the operating system overflow far above it."""
_BATCH = re.compile(r"(\d+(?:\.\d+)?) ?([KM]?) tokens", re.IGNORECASE)
_BATCH_UNIT = {"": 1, "K": 2**10, "M": 2**20}
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])i?B?)?", re.IGNORECASE)
_BYTES_UNIT = {None: 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOKENS = re.compile(r"(\d+(?:\.\d+)?) ?([KMBT]?)(?: tokens)?", re.IGNORECASE)
_TOKENS_UNIT = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def batch_tokens(batch_size: int | str) -> int | None:
    """Return the number of tokens of a batch size (`4M tokens` is 4 * 2^20), or None if it counts sequences."""
    if isinstance(batch_size, int):
        return None
    match = _BATCH.fullmatch(batch_size.strip())
    if match is None:
        raise ValueError(f"{batch_size!r} is not {BATCH_FORMS}")
    return round(float(match[1]) * _BATCH_UNIT[match[2].upper()])


def tokens(written: int | float | str) -> int:
    """Return the number of tokens of a data size: `140B` is 1.4e11."""
    if isinstance(written, str):
        match = _TOKENS.fullmatch(written.strip())
        if match is None:
            raise ValueError(f"{written!r} is not {TOKEN_FORMS}")
        return round(float(match[1]) * _TOKENS_UNIT[match[2].upper()])
    if int(written) != written:
        raise ValueError(f"{written!r} is not a whole number")
    return int(written)


def num_bytes(written: int | float | str) -> int:
    """Return the number of bytes of a size: `8 GiB` is 2^33."""
    if isinstance(written, str):
        match = _BYTES.fullmatch(written.strip())
        if match is None:
            raise ValueError(f"{written!r} is not {BYTE_FORMS}")
        return round(float(match[1]) * _BYTES_UNIT[match[2].upper() if match[2] else None])
    if int(written) != written or written < 0:
        raise ValueError(f"{written!r} is not a whole number")
    return int(written)


def tokens_text(count: int) -> str | int:
    """Return a data size in the largest unit that represents it exactly: 140000000000 is `140B`."""
    for unit, size in reversed(_TOKENS_UNIT.items()):
        if unit and size <= count and tokens(text := f"{count / size:.6g}{unit}") == count:
            return text
    return count


def _upper(written: Any) -> Any:
    return written.upper() if isinstance(written, str) else written


def is_not(forms: str) -> WrapValidator:
    """Return a validator that reports a refused value as `VALUE is not FORMS`, not once for each arm of a union."""

    def validate(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except (ValidationError, ValueError, TypeError, OverflowError):
            raise PydanticCustomError("is_not", "{forms}", {"forms": forms}) from None

    return WrapValidator(validate)


def _no_bool(value: Any) -> Any:
    """Refuse true and false, which pydantic would accept as 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("is_not", "{forms}", {"forms": "a number"})
    return value


def _positive_batch(value: Any) -> int | str:
    """Return a batch size as written, after checking that it is a positive count."""
    if isinstance(value, str) and not value.strip().isdigit():
        size: int | str = value
        amount = batch_tokens(value) or 0
    else:
        size = amount = int(value)
        if amount != float(value):
            raise ValueError("not whole")
    if not 1 <= amount <= MOST:
        raise ValueError("0, or more than can be counted")
    return size


def _positive_tokens(value: Any) -> int:
    """Return a data size in tokens, after checking that it is positive."""
    count = tokens(value)
    if not 1 <= count <= MOST:
        raise ValueError("0, or more than can be counted")
    return count


_RECOMPUTE_WORDS = {True: "full", False: "none"}
Count = Annotated[int, Field(ge=1, le=MOST_COUNT), BeforeValidator(_no_bool)]
"""A whole number of at least 1."""
Whole = Annotated[int, Field(ge=0, le=MOST_COUNT), BeforeValidator(_no_bool)]
"""A whole number of at least 0."""
Positive = Annotated[float, Field(gt=0, le=MOST_NUMBER, allow_inf_nan=False), BeforeValidator(_no_bool)]
"""A finite number above 0."""
NonNegative = Annotated[float, Field(ge=0, le=MOST_NUMBER, allow_inf_nan=False), BeforeValidator(_no_bool)]
"""A finite number of at least 0."""
Fraction = Annotated[float, Field(ge=0, le=1), BeforeValidator(_no_bool)]
"""A share, 0 to 1."""
Percent = Annotated[float, Field(ge=0, le=100), BeforeValidator(_no_bool)]
"""A share in percent, 0 to 100."""
Seconds = Annotated[int, Field(ge=0, le=SECONDS_OF_A_YEAR), BeforeValidator(_no_bool)]
"""A waiting time in seconds, 0 to a year."""
BelowOne = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_no_bool)]
"""A share, 0 to below 1."""
CountOrAuto = Annotated[Count | Literal["auto"], is_not("a whole number of at least 1, or `auto`")]
BoolOrAuto = Annotated[bool | Literal["auto"], is_not("true, false or `auto`")]
BatchSize = Annotated[
    int | str,
    BeforeValidator(_positive_batch),
    BeforeValidator(_no_bool),
    is_not(BATCH_FORMS),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^\d+(\.\d+)? ?[KkMm]? tokens$"}]}
    ),
]
"""Batch size in sequences (`128`) or tokens (`4M tokens`), kept as written."""
Tokens = Annotated[
    int,
    BeforeValidator(_positive_tokens),
    BeforeValidator(_no_bool),
    is_not(TOKEN_FORMS),
    PlainSerializer(tokens_text, return_type=int | str),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^\d+(\.\d+)? ?[KkMmBbTt]?( tokens)?$"},
            ]
        }
    ),
]
"""Number of tokens: `140B` is read as 1.4e11 and written back as `140B`."""
Bytes = Annotated[
    int,
    BeforeValidator(num_bytes),
    BeforeValidator(_no_bool),
    is_not(BYTE_FORMS),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": r"^\d+(\.\d+)? ?([KkMmGgTt]i?[Bb]?)?$"},
            ]
        }
    ),
]
"""Number of bytes: `8 GiB` is read as 2^33."""
Recompute = Annotated[
    Literal["none", "selective", "full"],
    BeforeValidator(lambda value: _RECOMPUTE_WORDS[value] if isinstance(value, bool) else value),
    WithJsonSchema({"enum": [True, False, "none", "selective", "full"]}),
]
"""Activations recomputed in the backward pass; true is `full`, false is `none`."""
RecomputeOrUnset = Annotated[Recompute | None, WithJsonSchema({"enum": [True, False, "none", "selective", "full"]})]


def least_rope_theta(max_position: int) -> float:
    """Return the minimum rotary base with which attention still prefers similar tokens at a distance of `max_position`.

    The fit of Men et al. 2024 (arXiv:2405.14591, section 4). Checked against its definition at 4096 to 262144 positions
    for heads of 128 channels: accurate to a factor of 1.5.
    """
    return 0.0424 * max_position**1.628


def usual_rope_theta(max_position: int) -> float:
    """Return the default rotary base for a context length: 1e4 as in Llama 2, above 8192 the next power of ten."""
    return 1e4 if max_position <= 8192 else 10.0 ** math.ceil(math.log10(least_rope_theta(max_position)))


Precision = Annotated[Literal["BF16", "FP32", "FP8"], BeforeValidator(_upper)]
