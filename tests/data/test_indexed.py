import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import HEADER, MAGIC, IndexedReader, IndexedWriter, token_dtype

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]


@pytest.fixture
def prefix(tmp_path, write_dataset):
    return write_dataset(tmp_path / "set", DOCUMENTS)


def refusal(prefix, **options) -> str:
    with pytest.raises(ConfigError) as raised:
        IndexedReader(prefix, **options)
    return str(raised.value)


def patch(file, offset: int, data: bytes) -> None:
    with open(file, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def test_a_stream_is_the_documents_end_to_end(prefix):
    reader = IndexedReader(prefix)
    assert reader.tokens(0, reader.num_tokens).tolist() == list(range(1, 12))
    assert reader.tokens(2, 5).tolist() == [3, 4, 5]
    assert reader.num_documents == 4
    assert [reader.document_start(d) for d in range(5)] == [0, 3, 4, 9, 11]
    assert [reader.document_of(t) for t in range(11)] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3]


def test_the_dtype_is_the_one_megatron_chooses():
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_writes_the_same_bytes_and_reads_ours(tmp_path, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 60000, n) for n in generator.integers(1, 200, 500)]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{theirs}.idx")
    with IndexedWriter(ours, dtype) as writer:
        for first in range(0, len(documents), 7):
            part = documents[first : first + 7]
            writer.add(np.concatenate(part), np.array([len(document) for document in part]))

    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"theirs{suffix}").read_bytes() == (tmp_path / f"ours{suffix}").read_bytes()
    read_by_megatron = IndexedDataset(str(ours))
    assert all(np.array_equal(read_by_megatron[i], document) for i, document in enumerate(documents))


@pytest.mark.slow
@pytest.mark.parametrize("multimodal", [False, True])
def test_documents_of_several_sequences_are_read_as_megatron_wrote_them(tmp_path, multimodal):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path}/set.bin", dtype=np.int32, multimodal=multimodal)
    for document in [[[1, 2], [3]], [[4, 5, 6]], [[7], [8], [9, 10]]]:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{tmp_path}/set.idx")

    reader = IndexedReader(tmp_path / "set")
    assert reader.num_documents == 3
    assert reader.tokens(0, 10).tolist() == list(range(1, 11))
    assert [reader.document_start(d) for d in range(4)] == [0, 3, 6, 10]
    assert [reader.document_of(t) for t in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_the_index_is_written_in_chunks_as_in_one_piece(tmp_path, monkeypatch, write_dataset):
    write_dataset(tmp_path / "whole", DOCUMENTS)
    monkeypatch.setattr("igla_mega.data.indexed._CHUNK", 2)
    write_dataset(tmp_path / "chunks", DOCUMENTS)
    assert (tmp_path / "whole.idx").read_bytes() == (tmp_path / "chunks.idx").read_bytes()


def test_a_failed_write_leaves_the_earlier_dataset_whole(prefix):
    before = {suffix: prefix.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx")}
    with pytest.raises(KeyError), IndexedWriter(prefix, np.uint16) as writer:
        writer.add(np.array([1]), np.array([1]))
        raise KeyError
    assert {file.name for file in prefix.parent.iterdir()} == {"set.bin", "set.idx"}
    assert before == {suffix: prefix.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx")}


def test_a_full_disk_while_finishing_leaves_nothing_half_written(prefix, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    before = prefix.with_suffix(".bin").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), IndexedWriter(prefix, np.uint16) as writer:
        writer.add(np.array([1]), np.array([1]))
    assert {file.name for file in prefix.parent.iterdir()} == {"set.bin", "set.idx"}
    assert prefix.with_suffix(".bin").read_bytes() == before


def test_a_second_writer_of_one_dataset_is_refused(tmp_path):
    with IndexedWriter(tmp_path / "set", np.uint16) as writer:
        with pytest.raises(ConfigError, match="another process is writing"):
            IndexedWriter(tmp_path / "set", np.uint16)
        writer.add(np.array([1, 2]), np.array([2]))
    assert IndexedReader(tmp_path / "set").num_tokens == 2


def test_what_a_killed_writer_left_is_taken_over(tmp_path, write_dataset):
    killed = (
        "import os, numpy as np; from igla_mega.data.indexed import IndexedWriter; "
        f"w = IndexedWriter({str(tmp_path / 'set')!r}, np.uint16); w.add(np.arange(90000), np.array([90000])); "
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", killed], check=False)
    assert not (tmp_path / "set.idx").exists()
    assert IndexedReader(write_dataset(tmp_path / "set", DOCUMENTS)).num_tokens == 11


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix, suffix):
    prefix.with_suffix(suffix).unlink()
    assert refusal(prefix).startswith(f"{prefix}{suffix}: no such file")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_an_empty_file_is_named(prefix, suffix):
    prefix.with_suffix(suffix).write_bytes(b"")
    assert refusal(prefix).startswith(f"{prefix}{suffix}: the file is empty")


def test_a_bin_cut_short_is_refused_with_both_sizes(prefix):
    os.truncate(f"{prefix}.bin", 17)
    message = refusal(prefix)
    assert f"{prefix}.bin: 17 bytes" in message
    assert "22 (11 tokens of uint16)" in message


def test_an_idx_cut_short_is_refused_with_both_sizes(prefix):
    os.truncate(f"{prefix}.idx", 100)
    message = refusal(prefix)
    assert f"{prefix}.idx: 100 bytes" in message
    assert "122" in message
    os.truncate(f"{prefix}.idx", 20)
    assert "20 bytes, but the header alone has 34" in refusal(prefix)


def test_an_idx_of_another_dtype_is_refused(prefix):
    patch(f"{prefix}.idx", 17, struct.pack("<B", 4))
    message = refusal(prefix)
    assert "22 bytes" in message
    assert "tokens of int32" in message


def test_an_idx_of_a_dtype_that_holds_no_ids_is_refused(prefix):
    patch(f"{prefix}.idx", 17, struct.pack("<B", 7))
    assert "dtype code 7 (float32)" in refusal(prefix)
    patch(f"{prefix}.idx", 17, struct.pack("<B", 99))
    assert "dtype code 99 (unknown)" in refusal(prefix)


def test_another_file_is_not_taken_for_an_index(prefix):
    patch(f"{prefix}.idx", 0, b"PK\x03\x04")
    assert "not a Megatron index" in refusal(prefix)


def test_another_version_of_the_format_is_refused(prefix):
    patch(f"{prefix}.idx", 9, struct.pack("<Q", 2))
    assert "version 2" in refusal(prefix)


def test_counts_that_do_not_fit_the_file_are_refused(prefix):
    patch(f"{prefix}.idx", 18, struct.pack("<Q", 2**60))
    assert "truncated or damaged" in refusal(prefix)


def test_an_index_without_documents_is_refused(prefix):
    prefix.with_suffix(".idx").write_bytes(HEADER.pack(MAGIC, 1, 8, 0, 1) + bytes(8))
    assert "contains no documents" in refusal(prefix)


def test_borders_that_do_not_cover_the_sequences_are_refused(prefix):
    patch(f"{prefix}.idx", 122 - 8, struct.pack("<q", 3))
    assert "documents span sequences 0 to 3, but there are 4" in refusal(prefix)


def test_an_index_whose_offsets_jump_is_refused(prefix):
    patch(f"{prefix}.idx", HEADER.size + 4 * 4 + 8, struct.pack("<q", 2))
    assert "sequence 0 (offset 0, 3 tokens of uint16)" in refusal(prefix)


def test_an_id_outside_the_vocabulary_is_named_with_its_place(tmp_path, write_dataset):
    prefix = write_dataset(tmp_path / "set", [[1, 2], [3, 900, 4]])
    message = refusal(prefix, vocab_size=512)
    assert f"{prefix}.bin: token 3 (document 1) has id 900, outside model.vocab_size 512" in message
    negative = write_dataset(tmp_path / "negative", [[1, -5]], np.int32)
    assert "token 1 (document 0) has id -5" in refusal(negative, vocab_size=512)


def test_opening_reads_a_bounded_part_of_a_large_dataset(tmp_path):
    """A sparse .bin of 8 GB and 1e6 documents: reading it all would take seconds."""
    count, length = 1_000_000, 4000
    with open(tmp_path / "set.bin", "wb") as stream:
        stream.truncate(2 * count * length)
    with open(tmp_path / "set.idx", "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, 8, count, count + 1))
        stream.write(np.full(count, length, np.int32).data)
        stream.write((np.arange(count, dtype=np.int64) * 2 * length).data)
        stream.write(np.arange(count + 1, dtype=np.int64).data)
    probe = (
        "import resource, time; from igla_mega.data.indexed import IndexedReader; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; t = time.process_time(); "
        f"IndexedReader({str(tmp_path / 'set')!r}, 100); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - t)"
    )
    kib, seconds = map(float, subprocess.check_output([sys.executable, "-c", probe], text=True).split())
    assert kib < 30 * 1024
    assert seconds < 0.5


@pytest.mark.slow
def test_a_dataset_of_a_hundred_million_documents_opens_in_a_second_and_50_mb(tmp_path):
    count, length = 100_000_000, 1000
    with open(tmp_path / "set.bin", "wb") as stream:
        stream.truncate(2 * count * length)
    with open(tmp_path / "set.idx", "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, 8, count, count + 1))
        for _ in range(0, count, 10_000_000):
            stream.write(np.full(10_000_000, length, np.int32).data)
        for first in range(0, count, 10_000_000):
            stream.write((np.arange(first, first + 10_000_000, dtype=np.int64) * 2 * length).data)
        for first in range(0, count, 10_000_000):
            stream.write(np.arange(first, first + 10_000_000, dtype=np.int64).data)
        stream.write(np.array([count], dtype=np.int64).data)
    probe = (
        "import resource, time; from igla_mega.data.indexed import IndexedReader; "
        "from igla_mega.data.windows import Windows; import numpy as np; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; t = time.process_time(); "
        f"reader = IndexedReader({str(tmp_path / 'set')!r}, 100); "
        "windows = Windows('a', 0, reader.num_tokens, 8192, 1); windows.starts(np.arange(100_000)); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - t)"
    )
    command = [sys.executable, "-c", probe]
    kib, seconds = map(float, subprocess.check_output(command, text=True, cwd=tmp_path.parent).split())
    assert kib < 50 * 1024
    assert seconds < 1.0
