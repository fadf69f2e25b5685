"""Preparation against Megatron-LM's whole-file gigatoken script on the same file, and what reads the result.

The corpus is the installed packages' source text, the tokenizers are trained on its begin: a byte-level BPE, and a
byte-fallback one of Llama 2's kind. Run on an otherwise idle machine.
"""

import argparse
import filecmp
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _common import REPOSITORY, write

CORPUS_BYTES = 157_000_000
VOCAB = 32_000
TOOL = REPOSITORY / "tools" / "preprocess_data.py"


def corpus(folder: Path) -> Path:
    """Source text of the installed packages, each file once, one a line."""
    path = folder / "code.jsonl"
    seen: set[str] = set()
    size = 0
    with open(path, "w", encoding="utf-8") as out:
        for file in _sources():
            text = file.read_text(encoding="utf-8", errors="ignore")
            if text and text not in seen:
                seen.add(text)
                line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                size += len(line.encode())
                out.write(line)
            if size > CORPUS_BYTES:
                break
    return path


def _sources() -> Iterator[Path]:
    root = Path(sysconfig.get_path("purelib"))
    for pattern in ("*.py", "*.h", "*.pyi", "*.hpp", "*.cuh", "*.md", "*.txt", "*.js"):
        yield from (file for file in sorted(root.rglob(pattern)) if file.stat().st_size < 400_000)


def tokenizers(folder: Path, text: Path) -> dict[str, Path]:
    """A byte-level BPE and one with byte fallback, trained on the first 10 MB."""
    import tokenizers as library

    from igla_mega.data.tokenizer import train_bpe

    sample = folder / "sample.jsonl"
    with open(text, "rb") as source:
        sample.write_bytes(source.read(10_000_000).rpartition(b"\n")[0] + b"\n")
    train_bpe([sample], VOCAB, folder / "bytes")

    engine = library.Tokenizer(library.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    prepend = [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
    engine.normalizer = library.normalizers.Sequence(prepend)
    engine.decoder = library.decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = library.trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=specials[:3], show_progress=False)
    words = (word for line in sample.open(encoding="utf-8") for word in json.loads(line)["text"].split())
    engine.train_from_iterator(words, trainer)
    described = json.loads(engine.to_str())
    vocabulary = dict.fromkeys([*specials, *described["model"]["vocab"]])
    described["model"]["vocab"] = {token: number for number, token in enumerate(vocabulary)}
    (folder / "fallback").mkdir()
    (folder / "fallback" / "tokenizer.json").write_text(json.dumps(described))
    (folder / "fallback" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return {"byte-level BPE": folder / "bytes", "byte-fallback BPE": folder / "fallback"}


_WATCHED = """
import atexit, pathlib, runpy, sys
def peak():
    sys.stderr.flush()
    print(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
atexit.register(peak)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script and prints its peak: what the system reports to a parent begins with the parent's own."""


def timed(command: list, **environment) -> dict:
    """A script's seconds, the most memory it held, and the lines it wrote."""
    words = [sys.executable, "-c", _WATCHED, *map(str, command)]
    started = time.perf_counter()
    run = subprocess.run(
        words,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.perf_counter() - started
    if run.returncode:
        raise SystemExit(run.stdout)
    *said, peak_kib = run.stdout.split("\n")[:-1]
    return {"seconds": seconds, "peak_mib": int(peak_kib) / 1024, "said": said}


def ours(text: Path, tokenizer: Path, out: Path) -> dict:
    for file in out.parent.glob(f"{out.name}*"):
        file.unlink()
    words = ["--input", text, "--output-prefix", out, "--tokenizer-model", tokenizer, "--append-eod"]
    return timed([TOOL, *words])


def megatron(text: Path, tokenizer: Path, out: Path, script: Path) -> dict:
    words = ["--input", text, "--output-prefix", out, "--tokenizer-type", "HuggingFaceTokenizer", "--use-gigatoken"]
    path = os.pathsep.join([str(script.resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    words += ["--tokenizer-model", tokenizer, "--append-eod"]
    return timed([script, *words], PYTHONPATH=path)


def running_rate(text: Path, tokenizer: Path) -> float:
    """MB/s of the input once all is loaded, in a process of its own."""
    code = (
        "import sys, time; from igla_mega.data import encoding, fast, formats; "
        "from igla_mega.data.tokenizer import load_tokenizer; from pathlib import Path; "
        "tokenizer = load_tokenizer(sys.argv[2]); inputs = formats.whole([Path(sys.argv[1])]); "
        "engine, why = fast.open_fast(tokenizer, ['a']); assert engine, why; "
        "job = encoding.Job(sys.argv[2], True); "
        "blocks = lambda: ((b, None) for b in formats.blocks(inputs, formats.BEGIN, formats.How())); "
        "started = time.perf_counter(); "
        "n = sum(e.input_bytes for e in encoding.encode_all(blocks(), job, tokenizer, 2, engine)); "
        "print(n / 1e6 / (time.perf_counter() - started))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", code, str(text), str(tokenizer)]
    return float(subprocess.check_output(words, text=True, env=environment))


def sampling() -> dict:
    """Seconds to find source and window of 10 million samples of the card's mix."""
    import numpy as np

    from igla_mega.data.blend import Blend
    from igla_mega.data.windows import Windows

    started = time.perf_counter()
    mix = {"web": 0.4, "code": 0.2, "books": 0.15, "academic": 0.15, "conversation": 0.1}
    sources, indices = Blend(mix).sources_of(0, 10_000_000)
    for number, name in enumerate(mix):
        Windows(name, 0, 10**10, 8192, 1).starts(indices[np.flatnonzero(sources == number)])
    return {"seconds": time.perf_counter() - started}


def loading(prefix: Path) -> dict:
    """Tokens a second of the loader alone, samples of 2048."""
    from igla_mega.data.batches import BatchShard, Corpus, Sampling

    sampling = Sampling(sequence_length=2048, seed=1, vocab_size=VOCAB + 300, validation_fraction=0.01)
    corpus = Corpus({"a": prefix}, {"a": 1.0}, sampling)
    share = BatchShard(64, 8)
    started = time.perf_counter()
    for step in range(40):
        for _ in corpus.micro_batches(step, share):
            pass
    return {"tokens_per_second": 40 * 64 * 2048 / (time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--corpus", type=Path, help="JSONL in the place of the installed packages' source text")
    parser.add_argument("--megatron", type=Path, help="Megatron-LM's tools/preprocess_data_fast.py")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    table: dict = {}
    with tempfile.TemporaryDirectory(prefix="igla-bench-") as name:
        folder = Path(name)
        text = args.corpus or corpus(folder)
        megabytes = text.stat().st_size / 1e6
        print(f"{text.stat().st_size:,} bytes of JSONL")
        for kind, tokenizer in tokenizers(folder, text).items():
            rows: dict[str, list[dict]] = {"ours": [], "Megatron-LM, gigatoken": []}
            for _ in range(args.rounds):
                rows["ours"].append(ours(text, tokenizer, folder / "ours"))
                if args.megatron:
                    rows["Megatron-LM, gigatoken"].append(megatron(text, tokenizer, folder / "theirs", args.megatron))
                print(kind, {who: round(runs[-1]["seconds"], 2) for who, runs in rows.items() if runs}, flush=True)
            rates = [running_rate(text, tokenizer) for _ in range(args.rounds)]
            for who, runs in rows.items():
                if runs:
                    seconds = [run["seconds"] for run in runs]
                    table[f"{who}, {kind}"] = {
                        "seconds": [round(s, 3) for s in seconds],
                        "median_seconds": round(statistics.median(seconds), 3),
                        "megabytes_per_second": round(megabytes / statistics.median(seconds), 1),
                        "peak_mib": round(max(run["peak_mib"] for run in runs)),
                    }
            table[f"ours, {kind}"]["running_megabytes_per_second"] = [round(rate, 1) for rate in rates]
            if args.megatron:
                same = filecmp.cmp(folder / "ours_text_document.bin", _theirs(folder), shallow=False)
                table[f"ours, {kind}"]["same_bin"] = same
        table["blend and sample 10M"] = sampling()
        table["load"] = loading(folder / "ours_text_document")
    for row, values in table.items():
        print(f"{row:45} {values}")
    print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB")
    if args.write:
        write("prepare", {"rounds": args.rounds, "measures": table})


def _theirs(folder: Path) -> Path:
    (path,) = folder.glob("theirs*.bin")
    return path


if __name__ == "__main__":
    main()
