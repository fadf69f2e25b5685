"""A FIFO, a device, a folder, a socket or a link to itself in the place of any file that is opened at a given path.

Opening a FIFO waits for a writer that never comes, and `/dev/zero` has no end: each reader must refuse them at once.
"""

import ast
import os
import signal
import socket
from pathlib import Path

import hostile
import pytest

from igla_mega.checkpoint import adapters, hf_config, integrity, store
from igla_mega.checkpoint.base import BASE, read_base
from igla_mega.checkpoint.pieces import Reader
from igla_mega.checkpoint.progress import read_progress
from igla_mega.checkpoint.safetensors import _header
from igla_mega.config import files, json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Model
from igla_mega.data import blend, document_packing, indexed, journal, tokenizer
from igla_mega.data.tuning import chat
from igla_mega.layout import hardware
from igla_mega.plan import base_model, calibration
from igla_mega.prepare import formats, manifest
from igla_mega.prepare.raw import inputs
from igla_mega.prepare.records import objects_of
from igla_mega.train import consolidation
from igla_mega.train.trackers import rewind

PACKAGE = Path(__file__).resolve().parents[2] / "igla_mega"
MODEL = Model(hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, vocab_size=32, max_position=32)


def placed(file: Path, name: str) -> Path:
    """The folder of a link of another name to a file."""
    (file.parent / name).symlink_to(file)
    return file.parent


def first_damage(file: Path) -> str:
    """Blocks of a corpus name their damage, which `prepare` raises as a ConfigError."""
    (block,) = formats.blocks_of([formats.Input(str(file), 10)], formats.How())
    return f"ConfigError: {block.damage}"


def reason(file: Path, name: str) -> str:
    """Damage of a checkpoint is a text, which verbs raise or print."""
    return f"ConfigError: {store.damage(placed(file, name))}"


READERS = {
    "recipe.yaml": load_recipe,
    "JSON": json_text.read,
    "text": files.read_text,
    "config.json": hf_config.read_json,
    "config.json, planned": lambda file: base_model._shape(placed(file, "config.json")),
    "adapter_config.json": lambda file: adapters._settings(placed(file, adapters.CONFIG)),
    "adapter_model.safetensors": lambda file: adapters.import_folder(with_settings(file), MODEL),
    "model.safetensors": lambda file: list(_header(file)),
    "progress.json": lambda file: read_progress(placed(file, "progress.json")),
    "manifest.json": lambda file: reason(file, store.MANIFEST),
    "file of a checkpoint": integrity.digest,
    "index of a checkpoint": lambda file: Reader(placed(file, ".metadata")).read_metadata(),
    "manifest of a dataset": lambda file: manifest.read_manifest(placed(file, "d.manifest.json") / "d"),
    "index of a dataset": lambda file: indexed.IndexedReader(placed(file, "d.idx") / "d"),
    "plan of packing": document_packing._opened,
    "calibration": lambda file: calibration.read(file, hardware.cpu()),
    "hardware": hardware.read,
    "tokenizer.json": tokenizer.load_tokenizer,
    "tokenizer.model": lambda file: tokenizer.load_tokenizer(placed(file, "a.model") / "a.model"),
    "ranks": tokenizer._ranks,
    "template": lambda file: chat.load_template(file.parent, file),
    "conversations": lambda file: list(objects_of(inputs.input_files([file]))),
    "text for a tokenizer": lambda file: tokenizer.train_bpe([file], 300, file.parent / "new"),
    "input of prepare": lambda file: inputs.input_files([file]),
    "corpus": first_damage,
    "packed corpus": lambda file: first_damage(placed(file, "a.jsonl.gz") / "a.jsonl.gz"),
    "Parquet": lambda file: first_damage(placed(file, "a.parquet") / "a.parquet"),
    "border of a part": lambda file: formats.line_start(file, 5, 10),
    "metrics.jsonl": lambda file: rewind(file, 3),
    "journal": lambda file: files.write_text(file, ""),
    "lock": lambda file: os.close(files.no_follow(file, os.O_RDWR | os.O_CREAT)),
}  # fmt: skip


def with_settings(file: Path) -> Path:
    (file.parent / adapters.CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    return placed(file, adapters.WEIGHTS)


def make(kind: str, file: Path) -> None:
    match kind:
        case "FIFO":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "folder":
            file.mkdir()
        case "link to itself":
            file.symlink_to(file.name)
        case "socket":
            socket.socket(socket.AF_UNIX).bind(str(file))


KINDS = ("FIFO", "device", "folder", "link to itself", "socket")


@pytest.mark.parametrize("name", READERS)
def test_no_reader_waits_for_what_is_no_file_or_reads_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    found = []
    for number, kind in enumerate(KINDS):
        file = Path(str(number)) / "y"
        file.parent.mkdir()
        make(kind, file)
        found.append((kind, file.absolute()))
    # One process for all kinds: each answer begins with its kind and is a ConfigError.
    said = in_time(lambda: "\n\n".join(f"{kind}: {answer(READERS[name], file)}" for kind, file in found))
    answers = dict(zip(KINDS, said.split("\n\n"), strict=True))
    links = {"device", "link to itself"} if name in ("journal", "lock") else set()
    for kind, text in answers.items():
        if kind in links:
            assert "Too many levels of symbolic links" in text
        elif name == "metrics.jsonl" and kind == "link to itself":
            assert text.endswith("[]"), "there is nothing to rewind"
        else:
            assert text.startswith(f"{kind}: ConfigError"), text


def answer(read, file: Path) -> str:
    try:
        return str(read(file))
    except ConfigError as error:
        return f"ConfigError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def in_time(task) -> str:
    """What a task says in a fork that ends after two minutes: without a writer, opening a FIFO waits for ever."""

    def run():
        signal.alarm(120)
        return task()

    return hostile.within(300, run, seconds=20)


@pytest.mark.parametrize("read", [json_text.read, load_recipe, hf_config.read_json, files.read_bytes])
def test_a_file_of_a_terabyte_is_refused_by_its_size(read, tmp_path):
    file = tmp_path / "config.json"
    file.touch()
    os.truncate(file, 1 << 40)
    said = in_time(lambda: read(file))
    assert said.startswith("ConfigError") and "too large for a file of this kind" in said


OUR_OWN = {
    "config/files": "the one way to open",
    "doctor/measure": "/proc/cpuinfo",
    "plan/calibration": "/proc/cpuinfo",
    "layout/hardware": "/proc/driver/nvidia",
    "distributed/torchrun": "/proc/vmstat",
    "monitor/heartbeat": "/proc of a process and of the boot",
    "guide/explain": "files of the package",
    "report/page": "files of the package",
}
"""Files with reads of paths that are not given, and what they read."""


def reads(tree: ast.AST) -> list[int]:
    """Lines of calls that read a file without `files.regular`."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name.endswith((".read_text", ".read_bytes")):
            found.append(node.lineno)
        if name == "open" and not any(keyword.arg == "opener" for keyword in node.keywords):
            mode = ast.unparse(node.args[1]) if len(node.args) > 1 else "'r'"
            if not set(mode) & set("wax") and "regular(" not in ast.unparse(node.args[0]):
                found.append(node.lineno)
    return found


def test_every_file_is_read_through_the_one_way_to_open():
    found = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
    lines = {name: reads(ast.parse(path.read_text())) for name, path in found.items()}
    assert {name: at for name, at in lines.items() if at and name not in OUR_OWN} == {}
    assert reads(ast.parse("open(a)\nopen(a, 'rb')\nb.read_text()\nPath(c).read_bytes()")) == [1, 2, 3, 4]


def test_blend_and_notes_refuse_them_too(tmp_path):
    """Readers that look for a file first take what is no file for a missing one, and never open it."""
    for name in (BASE, consolidation.ORIGIN, "mix.json"):
        os.mkfifo(tmp_path / name)
    assert in_time(lambda: (read_base(tmp_path), consolidation.read_origin(tmp_path))) == "(None, None)"
    assert "not a regular file" in in_time(lambda: answer(blend.read_mixes, tmp_path / "mix.json"))
    assert in_time(lambda: journal.Journal(tmp_path / BASE, "job").shards) == "[]"
