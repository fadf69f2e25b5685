"""What the fuzz tests feed to readers: files that begin as good ones and are then altered, and what they may answer."""

import atexit
import copy
import functools
import os
import resource
import shutil
import struct
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from igla_mega.config.errors import ConfigError

NUMBERS = (0, -1, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1)
ATOMS = [
    *(None, True, False, "", " ", "\0", "x" * 5000, "../../../etc/passwd", "/etc/passwd", "é\u202e", "1e999", "nan"),
    *(*NUMBERS, 10**19, 10**400, -(10**30), 0.5, -0.5, 1e308, 5e-324, float("inf"), float("nan")),
    *([], {}, [[]], [None], {"a": None}, [0] * 50, ["a", "b"], {"": {"": {}}}),
]


@functools.cache
def scratch() -> Path:
    """A folder of this process for the files of one example; each name is written again by the next."""
    folder = Path(tempfile.mkdtemp(prefix="igla_fuzz_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def refused(read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a reader answers; None where it refuses, which it may do in one way: a ConfigError with words."""
    try:
        return read(*arguments, **options)
    except ConfigError as error:
        assert len(str(error)) > 10, "a refusal says what is wrong"
        return None


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes of a good file after one to four accidents."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.integers(0, 5)):
            case 0 if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                form = draw(st.sampled_from(["<b", "<h", "<i", "<q", ">q"]))
                number = draw(st.sampled_from(NUMBERS)) & ((1 << 8 * struct.calcsize(form)) - 1)
                data[at : at + struct.calcsize(form)] = number.to_bytes(struct.calcsize(form), "little")
            case 2:
                del data[at:]
            case 3:
                del data[at : at + draw(st.integers(1, 40))]
            case 4:
                data[at:at] = data[at : at + draw(st.integers(1, 60))]
            case _:
                data[at:at] = draw(st.binary(min_size=1, max_size=20))
    return bytes(data)


@st.composite
def altered(draw: st.DrawFn, document: Any, atoms: Any = None) -> Any:
    """A document of JSON's or YAML's types, with one to three of its values replaced, removed or wrapped."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return draw(st.sampled_from(ATOMS))
        holder, key = draw(st.sampled_from(places))
        match draw(st.integers(0, 4)):
            case 0:
                del holder[key]
            case 1:
                holder[key] = [holder[key]]
            case _:
                holder[key] = copy.deepcopy(draw(st.sampled_from(atoms or ATOMS)))
    return document


def _places(document: Any):
    if isinstance(document, dict | list):
        for key in list(document) if isinstance(document, dict) else range(len(document)):
            yield document, key
            yield from _places(document[key])


def within(megabytes: int, task: Callable[[], Any], seconds: int = 20) -> str:
    """What a task says (its result, or the kind and words of its error) in a fork that may take so much more memory."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        try:
            # What can be written, not the address space: malloc reserves 128 MiB of that for each new thread.
            taken = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
            limit = taken + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            said = str(task())
        except ConfigError as error:
            said = f"ConfigError: {error}"
        except BaseException:
            said = traceback.format_exc()
        os.write(write_end, said.encode(errors="replace")[-60_000:])
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as answer:
        said = answer.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return said or f"ended by signal {os.WTERMSIG(status)}"
