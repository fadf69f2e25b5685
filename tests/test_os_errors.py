"""Whichever file cannot be written, and why: the message names it, the reason and the way out."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from command_line import environment, write_dataset, write_recipe

from igla_mega import os_errors
from igla_mega.checkpoint import integrity
from igla_mega.config import files
from igla_mega.config.load import load_recipe
from igla_mega.data.indexed import IndexedWriter
from igla_mega.data.journal import Journal, Lock, replace_file
from igla_mega.data.json_lines import Lines, rewind
from igla_mega.data.tokenizer import train_bpe
from igla_mega.os_errors import words_of
from igla_mega.prepare.formats import Broken
from igla_mega.prepare.state import Quarantine
from igla_mega.train.run_folder import lock_run_folder

CODES = [
    *("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "EMFILE", "ENFILE", "ENAMETOOLONG", "ENOENT", "EEXIST"),
    *("ENOTEMPTY", "EBUSY", "ENOTDIR", "EISDIR", "ELOOP", "EIO", "ESTALE", "ENODEV", "ENXIO", "EXDEV", "ETXTBSY"),
    *("EINVAL", "EMLINK", "EOVERFLOW"),
]


def caught(function: Callable, *args) -> BaseException:
    try:
        function(*args)
    except BaseException as error:
        return error
    raise AssertionError("no error")


@pytest.mark.parametrize("code", CODES)
def test_an_error_with_a_file_says_file_reason_and_way_out(code):
    number = getattr(errno, code)
    first, way_out = words_of(OSError(number, os.strerror(number), "runs/a/recipe.yaml")).splitlines()
    assert first.lower() == f"runs/a/recipe.yaml: {os.strerror(number)}.".lower()
    assert way_out.startswith("  ") and way_out.endswith(".") and len(way_out) > 15


class Stream:
    """As writers hold their file: as an attribute."""

    def __init__(self, path: Path, number: int):
        self._stream, self._number = open(path, "w+b"), number  # noqa: SIM115

    def flush(self):
        raise OSError(self._number, os.strerror(self._number))


def write_to(path: Path, number: int):
    with open(path.with_name("input")) as source, open(path, "w") as target:
        assert source and target
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("code", sorted({"ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE", "EACCES"}))
def test_an_error_of_a_write_names_the_file_that_was_being_written(code, tmp_path):
    number, path = getattr(errno, code), tmp_path / "written"
    (tmp_path / "input").touch()
    stream = Stream(path, number)
    for error in (caught(stream.flush), caught(write_to, path, number)):
        assert words_of(error).startswith(f"{path}: ")


def test_an_error_that_follows_from_another_names_that_ones_file(tmp_path):
    def fail():
        try:
            os.stat(tmp_path / "nothing")
        except OSError as error:
            raise OSError(errno.EIO, "Input/output error") from error

    assert words_of(caught(fail)).startswith(f"{tmp_path / 'nothing'}: ")


def test_an_error_of_a_connection_is_not_one_of_a_file_that_happens_to_be_open(tmp_path):
    def connect():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    def answer():
        raise OSError("a store's own words")

    def outer(inner):
        with open(tmp_path / "open", "w"):
            inner()

    assert words_of(caught(outer, connect)) == "[Errno 111] Connection refused"
    assert words_of(caught(outer, answer)) == "a store's own words"
    assert words_of(ValueError("no such key")) is None


def test_a_rename_names_its_target_unless_the_source_is_gone(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "b").mkdir()
    assert words_of(caught(os.replace, tmp_path / "a", tmp_path / "b")).startswith(f"{tmp_path / 'b'}: is a directory")
    assert words_of(caught(os.replace, tmp_path / "c", tmp_path / "d")).startswith(f"{tmp_path / 'c'}: no such file")


@contextmanager
def full(limit: int = 0):
    """No file of this process grows beyond `limit` bytes, as on a full disk (the kernel says EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def lines(folder: Path):
    file = Lines(folder / "x.jsonl")
    file.add({"step": 1})
    file.sync()


def rewound(folder: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    (folder / "x.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    rewind(folder / "x.jsonl", 1)


def quarantine(folder: Path):
    aside = Quarantine(str(folder / "x"), 0)
    aside.add(Broken("place", "reason", "record"))
    aside.flush()


def indexed(folder: Path):
    with IndexedWriter(folder / "x", np.uint16) as writer:
        writer.add(np.zeros(10, dtype=np.int64), np.array([10]))


def safetensors(folder: Path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(4)}, folder / "x.safetensors")


def exported(folder: Path):
    from igla_mega.checkpoint.safetensors import appearing

    with appearing(folder / "x") as temporary:
        safetensors(temporary)


def tokenizer(folder: Path):
    train_bpe([], 260, folder / "x")


WRITERS = [
    lambda folder: files.write_text(folder / "x", "text"),
    lambda folder: integrity.write_text(folder / "x", "text"),
    lambda folder: replace_file(folder / "x", b"text"),
    lambda folder: Journal(folder / "x", "job"),
    lambda folder: Lock(folder / "x"),
    lambda folder: lock_run_folder(folder / "x", load_recipe("pretrain_7b")),
    lines,
    rewound,
    quarantine,
    indexed,
    safetensors,
    exported,
    tokenizer,
    lambda folder: np.savez(folder / "x.npz", a=np.zeros(4)),
    lambda folder: np.save(folder / "x.npy", np.zeros(4)),
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: str(write.__code__.co_firstlineno))
def test_no_writer_fails_on_a_full_disk_without_a_file_and_a_way_out(write, tmp_path):
    try:
        with full():
            write(tmp_path)
    except Exception as error:
        # Not under the limit: where nothing can be written, neither can the report of a failed test.
        said = words_of(error) or str(error)
    else:
        raise AssertionError("it was written")
    first, way_out = said.splitlines()[:2]
    assert str(tmp_path) in first, said
    assert way_out.startswith("  ") and len(way_out) > 15, said


def command(*arguments, limit: int | None = None, **options) -> subprocess.CompletedProcess:
    before = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit is not None else None
    return subprocess.run(
        [sys.executable, "-m", "igla_mega", *map(str, arguments)],
        env=environment(**options.pop("variables", {})),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
        **options,
    )


@pytest.mark.parametrize("limit", [0, 200])
def test_train_on_a_full_disk_names_the_file(limit, tmp_path):
    write_dataset(tmp_path / "prepared" / "words")
    recipe = write_recipe(tmp_path)
    done = command("train", recipe, "--run", tmp_path / "run", limit=limit, stdout=subprocess.DEVNULL)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    # Without any space a library fails that needs a folder for temporary files.
    place = str(tmp_path / "run") if limit else "set TMPDIR"
    assert place in done.stderr and "\n  " in done.stderr.split("error:")[1], done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_output_is_an_error_and_a_closed_pipe_ends_quietly(unbuffered):
    variables = {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as device:
        done = command("recipes", stdout=device, variables=variables)
    assert done.returncode == 1 and done.stderr.lower().startswith("error: standard output: no space left on device")
    reader, writer = os.pipe()
    os.close(reader)
    done = command("recipes", stdout=writer, variables=variables)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    """The same table of errors that a system really gives, by what stands in the way."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    said = {
        "not a directory": caught(files.write_text, blocker / "x", ""),
        "is a directory": caught(files.write_text, tmp_path, ""),
        "file name too long": caught(files.write_text, tmp_path / ("x" * 300), ""),
        "no such file or directory": caught(files.write_text, tmp_path / "a" / "b", ""),
    }
    (tmp_path / "link").symlink_to(blocker)
    said["too many levels of symbolic links"] = caught(files.write_text, tmp_path / "link", "")
    for reason, error in said.items():
        assert f": {reason}.\n  " in words_of(error) and str(tmp_path) in words_of(error)
    assert json.dumps(os_errors._CHECK_DISK) not in json.dumps([words_of(error) for error in said.values()])
