"""One page about prepared data: what to look at before a GPU is paid for."""

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from igla_mega.data.document_packing import Statistics, statistics
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.journal import replace_file
from igla_mega.data.prepared import DataSection, source_prefixes
from igla_mega.data.tokenizer import Tokenizer, load_tokenizer
from igla_mega.prepare.manifest import modified_inputs, read_manifest

NUM_SAMPLES = 5
SAMPLE_TOKENS = 200
MOST_LENGTHS = 1_000_000
"""Documents whose lengths are looked at, spread over the data set; packing is reckoned on the first of them."""
_CHUNK = 1 << 16
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #d8dee4; }
pre { background: #f6f8fa; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 6px; }
svg { width: 100%; height: auto; } .bar { fill: #3b6ea8; } .note { color: #9a4a00; }
text { font-size: 11px; fill: #57606a; }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3; } pre { background: #161b22; }
tr { border-color: #30363d; } .note { color: #e3a35c; } text { fill: #9198a1; } .bar { fill: #6ea0d8; } }
"""


def write_report(data: DataSection, sequence_length: int = 8192) -> Path:
    """Write `<data.prepared>/report.html`.

    Args:
        sequence_length: tokens of a training sample, for the figures of packing.

    Raises:
        ConfigError: a source that is not prepared.
    """
    prefixes = source_prefixes(data)
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    readers = {name: IndexedReader(prefix) for name, prefix in prefixes.items()}
    manifests = {name: read_manifest(prefix) or {} for name, prefix in prefixes.items()}
    mix = getattr(data, "mix", {})
    parts = ["<h1>Prepared data</h1>", _overview(readers, manifests, mix)]
    for name, reader in readers.items():
        parts.append(_section(name, reader, manifests[name], tokenizer, sequence_length))
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Prepared data</title><style>{_STYLE}</style>"
    path = Path(data.prepared or ".") / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (page + "\n".join(parts) + "</html>\n").encode())
    return path


def _overview(
    readers: Mapping[str, IndexedReader], manifests: Mapping[str, dict[str, Any]], mix: Mapping[str, float]
) -> str:
    total = sum(reader.num_tokens for reader in readers.values())
    weights = sum(mix.values())
    rows = []
    for name, reader in readers.items():
        manifest = manifests[name]
        dropped = manifest.get("dropped", {})
        rows.append(
            [
                name,
                f"{reader.num_documents:,}",
                f"{reader.num_tokens:,}",
                f"{reader.num_tokens / total:.1%}",
                f"{mix[name] / weights:.1%}" if name in mix else "–",
                f"{manifest['text_bytes'] / manifest['tokens']:.2f}" if manifest.get("tokens") else "–",
                f"{dropped.get('duplicate', 0):,}",
                f"{sum(count for kind, count in dropped.items() if kind != 'duplicate'):,}",
                f"{manifest.get('empty', 0):,}",
                f"{manifest.get('broken', 0):,}",
            ]
        )
    heads = ["source", "documents", "tokens", "share of tokens", "weight in the mix", "bytes per token"]
    return _table([*heads, "duplicates left out", "filtered", "empty", "broken"], rows)


def _section(
    name: str, reader: IndexedReader, manifest: dict[str, Any], tokenizer: Tokenizer | None, sequence_length: int
) -> str:
    lengths = _lengths(reader)
    parts = [f"<h2>{html.escape(name)}</h2>"]
    for file in modified_inputs(reader.prefix)[:5]:
        parts.append(f"<p class=note>{html.escape(file)} is no longer as it was when this was prepared</p>")
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 0.99, 1])
    parts.append(
        "<p>Tokens of a document: least {:,.0f}, tenth {:,.0f}, median {:,.0f}, nine tenths {:,.0f}, 99 in a hundred"
        " {:,.0f}, most {:,.0f}</p>".format(*quantiles)
    )
    parts.append(_histogram(lengths))
    packing = [
        _packing_row(words, statistics(lengths[: 1 << 18], sequence_length, packed=packed))
        for words, packed in (("end to end", False), ("best fit", True))
    ]
    heads = [f"in samples of {sequence_length:,}", "padding", "documents cut", "tokens behind a cut"]
    parts.append(_table([*heads, "tokens of longer documents"], packing))
    if languages := manifest.get("languages"):
        parts.append(_table(["language", "documents"], [[tag, f"{count:,}"] for tag, count in languages.items()]))
    if dropped := manifest.get("dropped"):
        parts.append(_table(["left out", "documents"], [[kind, f"{count:,}"] for kind, count in dropped.items()]))
    if tokenizer is not None:
        parts.append("<h3>Samples, decoded</h3>")
        parts += [f"<pre>{html.escape(text)}</pre>" for text in samples(reader, tokenizer)]
    return "\n".join(parts)


def samples(reader: IndexedReader, tokenizer: Tokenizer) -> Iterator[str]:
    """The begins of some documents, spread over the data set."""
    for document in np.unique(np.linspace(0, reader.num_documents - 1, NUM_SAMPLES).astype(np.int64)):
        start, stop = (reader.document_start(int(document) + i) for i in (0, 1))
        yield tokenizer.decode(reader.tokens(start, min(stop, start + SAMPLE_TOKENS)).tolist())


def _lengths(reader: IndexedReader) -> np.ndarray:
    """Of all documents, or of runs of them spread evenly where there are many."""
    count = reader.num_documents
    num_chunks = min(-(-count // _CHUNK), MOST_LENGTHS // _CHUNK)
    firsts = np.unique(np.linspace(0, max(count - _CHUNK, 0), num_chunks).astype(np.int64))
    if count <= num_chunks * _CHUNK:
        firsts = np.arange(0, count, _CHUNK)
    return np.concatenate([np.diff(reader.document_starts(f, min(f + _CHUNK, count))) for f in firsts.tolist()])


def _packing_row(words: str, found: Statistics) -> list[str]:
    shares = (found.truncated / max(found.tokens, 1), found.long_share)
    return [words, f"{found.padding:.2%}", f"{found.cut_documents:,}", *(f"{share:.2%}" for share in shares)]


def _histogram(lengths: np.ndarray) -> str:
    """Documents and tokens by powers of two of the length, as bars."""
    powers = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    documents, tokens = np.bincount(powers), np.bincount(powers, lengths)
    width, height, gap = 900, 150, 900 / len(documents)
    bars = []
    for row, (title, values) in enumerate((("documents", documents), ("tokens", tokens))):
        base = (row + 1) * (height + 40) - 20
        bars.append(f'<text x="0" y="{base - height - 5}">{title} by length in tokens</text>')
        for power, value in enumerate(values.tolist()):
            tall = height * value / max(values.max(), 1)
            about = f"{2**power:,} to {2 ** (power + 1) - 1:,}: {value:,.0f} {title}"
            bars.append(
                f'<rect class="bar" x="{power * gap + 1:.1f}" y="{base - tall:.1f}" width="{gap - 2:.1f}"'
                f' height="{tall:.1f}"><title>{about}</title></rect>'
            )
            bars.append(f'<text x="{power * gap + 2:.1f}" y="{base + 14}">{_short(2**power)}</text>')
    return f'<svg viewBox="0 0 {width} {2 * (height + 40)}" role="img">{"".join(bars)}</svg>'


def _short(count: int) -> str:
    return f"{count >> 20}M" if count >= 1 << 20 else f"{count >> 10}K" if count >= 1 << 10 else str(count)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
