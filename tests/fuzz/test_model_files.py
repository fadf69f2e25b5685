"""Checkpoints, Hugging Face folders and adapters that come from anybody."""

import collections
import functools
import hashlib
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import hostile
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile import altered, damaged, refused, scratch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata as records

from igla_mega.checkpoint import adapters, hugging_face, store
from igla_mega.checkpoint.base import BASE, read_base
from igla_mega.checkpoint.folder import read_recipe, resolve_checkpoint
from igla_mega.checkpoint.hf_names import weights_of
from igla_mega.checkpoint.pieces import Pieces, Reader, load, read_whole
from igla_mega.checkpoint.progress import read_progress
from igla_mega.checkpoint.safetensors import open_folder
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Model
from igla_mega.data.json_lines import rewind
from igla_mega.train import consolidation

CONFIG = {
    **{"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32},
    **{"num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 32, "rms_norm_eps": 1e-5},
    **{"tie_word_embeddings": False, "rope_theta": 1e4, "rope_scaling": None, "hidden_act": "silu", "bos_token_id": 1},
}
MODEL = Model(
    hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=8, vocab_size=32, max_position=32
)


@functools.cache
def folder() -> Path:
    """A Hugging Face folder of one small layer."""
    path = scratch() / "hf_good"
    path.mkdir()
    parts = {name: shape for weight in weights_of(MODEL) for name, shape in weight.parts.items()}
    save_file({name: torch.randn(shape) for name, shape in parts.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@functools.cache
def checkpoint() -> Path:
    """A checkpoint made of it."""
    path = scratch() / "checkpoint_good"
    hugging_face.import_folder(folder(), path, say=lambda _: None)
    return path


def copy_of(good: Path, name: str) -> Path:
    path = scratch() / name
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, path)
    return path


def seal(path: Path) -> None:
    """Make the manifest right about the files as they are now, as a stranger would."""
    files = {}
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.name != store.MANIFEST):
        digest = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        files[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "blake2b": digest}
    (path / store.MANIFEST).write_text(json.dumps({"format": 1, "files": files}))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: read_whole(Reader(path), name) for name in Reader(path).shapes()}


@functools.cache
def index() -> records.Metadata:
    return dcp.FileSystemReader(checkpoint()).read_metadata()


@given(st.data())
def test_a_damaged_index_of_a_checkpoint_is_refused_or_gives_tensors_of_its_shapes(data):
    path = copy_of(checkpoint(), "ck")
    (path / ".metadata").write_bytes(data.draw(damaged((checkpoint() / ".metadata").read_bytes())))
    seal(path)
    for name, tensor in (refused(read_tensors, path) or {}).items():
        assert tuple(tensor.shape) == tuple(Reader(path).shapes()[name])


WRONG_SIZES = [0, -1, 1 << 40, 1 << 62, 3]


@given(st.data())
def test_an_index_that_lies_is_refused_or_gives_what_was_saved(data):
    path, lying = copy_of(checkpoint(), "ck"), pickle.loads((checkpoint() / ".metadata").read_bytes())  # noqa: S301
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(lying.state_dict_metadata)))
        key = next(key for key in lying.storage_data if key.fqn == name)
        entry, place = lying.state_dict_metadata[name], lying.storage_data[key]
        wrong = data.draw(st.sampled_from(WRONG_SIZES))
        match data.draw(st.integers(0, 8)):
            case 0:
                place.relative_path = data.draw(st.sampled_from(["../x", "/etc/passwd", "..", "", "recipe.yaml", "\0"]))
            case 1:
                place.offset = wrong
            case 2:
                place.length = wrong
            case 3 if isinstance(entry, records.TensorStorageMetadata):
                entry.size = torch.Size([abs(wrong) % 99, *entry.size[1:]])
            case 4 if isinstance(entry, records.TensorStorageMetadata):
                entry.chunks = data.draw(st.sampled_from([[], entry.chunks * 2, entry.chunks]))
            case 5 if isinstance(entry, records.TensorStorageMetadata) and entry.chunks:
                entry.chunks[0].sizes = torch.Size([wrong, *entry.chunks[0].sizes[1:]])
            case 6:
                lying.state_dict_metadata[name] = records.BytesStorageMetadata()
            case 7 if isinstance(entry, records.TensorStorageMetadata):
                entry.properties.dtype = data.draw(st.sampled_from([torch.float64, torch.int8, torch.bfloat16]))
            case _:
                place.transform_descriptors = ["stream.zstd"]
    (path / ".metadata").write_bytes(pickle.dumps(lying))
    seal(path)
    good = read_tensors(checkpoint())
    for name, tensor in (refused(read_tensors, path) or {}).items():
        expected = good[name].to(tensor.dtype)
        assert torch.equal(tensor.flatten()[: expected.numel()], expected.flatten()[: tensor.numel()])


class Runs:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def exploits(mark: Path) -> dict[str, bytes]:
    """Pickles that write a file when they are loaded by Python's own unpickler, and some that cannot."""
    command = f"touch {mark}"
    text = command.encode()
    return {
        "os.system": pickle.dumps(Runs(os.system, command)),
        "eval": pickle.dumps(Runs(eval, f"open({str(mark)!r}, 'w')")),
        "inst": b"(S'" + text + b"'\nios\nsystem\n.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x11serialization.os\x93.",
        "dotted in torch": b"\x80\x04\x8c\x29torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c"
        + bytes([len(text)]) + text + b"\x85R.",
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.",
        "writer": b"ctorch.distributed.checkpoint.filesystem\nFileSystemWriter\n(S'" + str(mark).encode() + b"'\ntR.",
        "path": b"ctorch.distributed.checkpoint.filesystem\nPath\n(S'x'\ntR.",
        "in a dict": pickle.dumps({"state_dict_metadata": Runs(os.system, command)}),
        "by extension": b"\x80\x02\x82\x01.",
        "torch.load": b"ctorch\nload\n(S'x'\ntR.",
        "deep": b"(" * 200_000,
        "memory": b"\x80\x04\x8e" + struct.pack("<q", 1 << 60),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(exploits(Path("x"))))
def test_no_pickle_in_the_index_of_a_checkpoint_runs_code(name, tmp_path):
    mark = tmp_path / "ran"
    content = exploits(mark)[name]
    if name in ("os.system", "eval", "inst"):
        pickle.loads(content)  # noqa: S301 - it would indeed
        mark.unlink()
    path = copy_of(checkpoint(), "evil")
    (path / ".metadata").write_bytes(content)
    seal(path)
    assert "not a checkpoint index" in hostile.within(500, lambda: Reader(path).shapes())
    assert not mark.exists()


@pytest.mark.parametrize("as_bytes", [False, True])
def test_no_pickle_in_a_part_of_a_checkpoint_runs_code(as_bytes, tmp_path):
    """Also not where the index calls a tensor a pickled object, which DCP itself unpickles without restriction."""
    mark = tmp_path / "ran"
    path = copy_of(checkpoint(), "evil")
    lying = pickle.loads((path / ".metadata").read_bytes())  # noqa: S301
    name = "decoder.final_layernorm.weight"
    [(key, place)] = [(key, place) for key, place in lying.storage_data.items() if key.fqn == name]
    torch.save(Runs(os.system, f"touch {mark}"), path / "part")
    torch.load(path / "part", weights_only=False)
    assert mark.exists()
    mark.unlink()
    place.relative_path, place.offset, place.length = "part", 0, (path / "part").stat().st_size
    if as_bytes:
        lying.state_dict_metadata[name] = records.BytesStorageMetadata()
        lying.storage_data[records.MetadataIndex(name)] = lying.storage_data.pop(key)
    (path / ".metadata").write_bytes(pickle.dumps(lying))
    seal(path)
    pieces = {name: Pieces.of((8,), [((0,), torch.empty(8))])}
    with pytest.raises(ConfigError):
        load(pieces, Reader(path))
    assert not mark.exists()


@given(st.data())
def test_a_damaged_part_of_a_checkpoint_is_found_by_its_digest(data):
    path = copy_of(checkpoint(), "ck")
    file = data.draw(st.sampled_from(sorted(name.name for name in checkpoint().iterdir() if name.is_file())))
    content = data.draw(damaged((checkpoint() / file).read_bytes()))
    (path / file).write_bytes(content)
    found = refused(resolve_checkpoint, path)
    if found is not None and file != store.MANIFEST:
        assert content == (checkpoint() / file).read_bytes()


@given(st.data())
def test_an_altered_manifest_or_progress_is_refused_or_read(data):
    path = copy_of(checkpoint(), "ck")
    manifest = json.loads((path / "manifest.json").read_text())
    names = st.sampled_from(["../hf_good/config.json", "/etc/passwd", "a\0b", "", ".", *hostile.ATOMS[:5]])
    manifest = data.draw(altered(manifest))
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
        manifest["files"][str(data.draw(names))] = {"bytes": 1, "blake2b": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "progress.json").write_text(
        json.dumps(data.draw(altered(json.loads((path / "progress.json").read_text()))))
    )
    reason = store.damage(path)
    assert reason is None or str(path) in reason
    found = refused(read_progress, path)
    assert found is None or isinstance(found.step, int)


def test_a_manifest_names_no_file_outside_its_folder():
    path = copy_of(checkpoint(), "ck")
    (path / "manifest.json").write_text(json.dumps({"files": {"../../../../etc/passwd": {"bytes": 1, "blake2b": "0"}}}))
    reason = store.damage(path)
    assert "etc/passwd" in reason and ("not in the folder" in reason or "outside" in reason)


@pytest.mark.parametrize("change", ["num_layers: 10000", "hidden_size: 8000000000", "vocab_size: 32000000000"])
def test_a_recipe_beside_a_checkpoint_that_claims_more_than_is_there_is_refused_before_anything_is_made(change):
    path, key = copy_of(checkpoint(), "ck"), change.split(":")[0]
    lines = (path / "recipe.yaml").read_text().splitlines()
    (path / "recipe.yaml").write_text(
        "\n".join(f"  {change}" if line.strip().startswith(f"{key}:") else line for line in lines)
    )
    seal(path)
    said = hostile.within(300, lambda: read_recipe(path), seconds=5)
    assert said.startswith("ConfigError") and "its recipe.yaml gives a model" in said


@given(altered({"base_model": "x", "checkpoint": "y", "digest": "z"}).map(json.dumps))
@example("[" * 100_000)
def test_an_altered_note_of_a_base_is_refused_or_names_one(note):
    path = scratch() / "adapted"
    path.mkdir(exist_ok=True)
    (path / BASE).write_text(note)
    found = refused(read_base, path)
    assert found is None or isinstance(found["checkpoint"] + found["digest"], str)
    origin = {"samples": 1, "sources": ["a"], "normalization": "per token"}
    (path / consolidation.ORIGIN).write_text(note if len(note) % 2 else json.dumps(origin))
    refused(consolidation.read_origin, path)


@given(st.lists(altered({"step": 1, "loss": 2.0}).map(json.dumps) | damaged(b'{"step": 3}').map(repr), max_size=5))
@example(["[" * 100_000])
def test_metrics_of_anybody_are_rewound(lines):
    file = scratch() / "metrics.jsonl"
    file.write_bytes("\n".join(['{"step": 1}', *lines, '{"step": 9}']).encode() + b"\n\xff\xfe\n")
    rewind(file, 5)
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert kept[0] == {"step": 1} and all(entry.get("step", 0) <= 5 for entry in kept)


def imported(path: Path) -> dict[str, torch.Tensor] | None:
    """What an import makes of a folder."""
    target = scratch() / "imported"
    shutil.rmtree(target, ignore_errors=True)
    if refused(hugging_face.import_folder, path, target, say=lambda _: None) is None:
        assert not target.exists()
        return None
    return read_tensors(target)


@given(altered(CONFIG))
def test_an_altered_config_is_refused_or_fits_the_tensors(config):
    path = copy_of(folder(), "hf")
    (path / "config.json").write_text(json.dumps(config))
    found = imported(path)
    if found is not None:
        assert found["output_layer.weight"].shape == (32, 8)


@given(st.data())
def test_damaged_safetensors_are_refused_or_give_what_their_header_says(data):
    path = copy_of(folder(), "hf")
    good = (folder() / "model.safetensors").read_bytes()
    size = 8 + struct.unpack("<Q", good[:8])[0]
    header = data.draw(damaged(good[: size + 8]))
    (path / "model.safetensors").write_bytes(header + good[size + 8 :])
    imported(path)


LIES = ["offsets", "shape", "dtype", "order", "overlap", "more", "negative", "nested", "twice"]


@given(st.sampled_from(LIES), st.sampled_from([0, 1, 8, 256, 1 << 40, (1 << 64) - 1]))
def test_a_header_of_safetensors_that_lies_is_refused(lie, number):
    path = copy_of(folder(), "hf")
    good = (folder() / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + size])
    first, second, *_ = (entry for name, entry in header.items() if name != "__metadata__")
    changes = {
        "offsets": lambda: first.update(data_offsets=[0, number]),
        "shape": lambda: first.update(shape=[number, number]),
        "dtype": lambda: first.update(dtype="F64"),
        "order": lambda: first.update(data_offsets=first["data_offsets"][::-1]),
        "overlap": lambda: first.update(data_offsets=second["data_offsets"]),
        "more": lambda: header.update(other={"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}),
        "negative": lambda: first.update(data_offsets=[-8, number]),
        "nested": lambda: header.update(__metadata__={"a": {"b": "c"}}),
        "twice": lambda: None,
    }
    changes[lie]()
    text = json.dumps(header).encode()
    if lie == "twice":
        text = text[:-1] + b', "lm_head.weight": ' + json.dumps(first).encode() + b"}"
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + good[8 + size :])
    assert imported(path) is None


@given(
    altered({"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "a.safetensors", "x": "b.safetensors"}})
)
@example({"weight_map": {"lm_head.weight": "../hf_good/model.safetensors"}})
@example({"weight_map": {"lm_head.weight": "/etc/passwd"}})
@example({"weight_map": {"lm_head.weight": ".."}})
def test_an_index_of_shards_names_only_files_beside_it(content):
    path = copy_of(folder(), "hf")
    shutil.move(path / "model.safetensors", path / "a.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(content))
    assert imported(path) is None or set(content["weight_map"].values()) == {"a.safetensors"}


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"])
def test_a_config_that_claims_terabytes_allocates_nothing(key):
    path = copy_of(folder(), "hf")
    (path / "config.json").write_text(json.dumps({**CONFIG, key: 10**12}))
    target = scratch() / "huge"
    said = hostile.within(300, lambda: hugging_face.import_folder(path, target, say=print), seconds=5)
    assert said.startswith("ConfigError") and not target.exists()


def test_a_header_that_claims_terabytes_allocates_nothing():
    path = copy_of(folder(), "hf")
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 42) + b"{}")
    assert hostile.within(100, lambda: open_folder(path)).startswith("ConfigError")


SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}


@functools.cache
def matrices() -> bytes:
    from igla_mega.config.features import Lora

    shapes = adapters.shapes_of(MODEL, Lora(rank=2, alpha=4, target_modules=("q_proj", "v_proj")))
    save_file({adapters.peft_name(name): torch.randn(shape) for name, shape in shapes.items()}, scratch() / "lora")
    return (scratch() / "lora").read_bytes()


@given(st.data())
def test_an_altered_adapter_is_refused_or_fits_its_base(data):
    path = scratch() / "peft"
    path.mkdir(exist_ok=True)
    (path / adapters.CONFIG).write_text(json.dumps(data.draw(st.just(SETTINGS) | altered(SETTINGS))))
    (path / adapters.WEIGHTS).write_bytes(data.draw(st.just(matrices()) | damaged(matrices())))
    found = refused(adapters.import_folder, path, MODEL)
    if found is not None:
        assert len(found[1]) == len(load_file(path / adapters.WEIGHTS)) == 4 and found[0].rank == 2


def test_what_the_good_files_give_is_what_was_saved():
    assert collections.Counter(map(tuple, Reader(checkpoint()).shapes().values()))[(8,)] == 3
    tensors = load_file(folder() / "model.safetensors")
    assert torch.equal(read_tensors(checkpoint())["output_layer.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_are_refused_by_tensor_and_count(value, dtype):
    path = copy_of(folder(), "hf")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path / "model.safetensors").items()}
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2:4] = float(value)
    save_file(tensors, path / "model.safetensors")
    target = scratch() / "imported"
    shutil.rmtree(target, ignore_errors=True)
    with pytest.raises(ConfigError, match=r"mlp.up_proj.weight: 2 of 64 values are NaN or infinite\.\n  Download"):
        hugging_face.import_folder(path, target, say=print)
    assert not target.exists() and not list(scratch().glob(".writing_*"))


def test_weights_whose_sum_overflows_are_finite():
    path = copy_of(folder(), "hf")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][:] = 3e38
    save_file(tensors, path / "model.safetensors")
    assert imported(path)["output_layer.weight"].isfinite().all()


def test_an_adapter_that_is_not_finite_is_refused_by_matrix_and_count():
    path = scratch() / "peft"
    path.mkdir(exist_ok=True)
    (path / adapters.CONFIG).write_text(json.dumps(SETTINGS))
    (path / adapters.WEIGHTS).write_bytes(matrices())
    tensors = load_file(path / adapters.WEIGHTS)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path / adapters.WEIGHTS)
    with pytest.raises(ConfigError, match=rf"{name}: 1 of \d+ values are NaN or infinite"):
        adapters.import_folder(path, MODEL)
