"""Write an HTML page about prepared data, to be inspected before training starts."""

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
"""Number of decoded samples per source."""
SAMPLE_TOKENS = 200
"""Maximum number of tokens per decoded sample."""
MAX_LENGTHS = 1_000_000
"""Maximum number of documents whose lengths are read, spread over the dataset."""
_PACKED_LENGTHS = 1 << 18
"""Number of those documents, the first ones, for which packing is computed."""
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
    """Write `<data.prepared>/report.html` and return its path.

    Args:
        sequence_length: number of tokens per training sample, for the packing statistics.

    Raises:
        ConfigError: a source is not prepared.
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
    """Return the table of all sources."""
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
    """Return the section of one source: lengths, packing, languages, dropped documents and samples."""
    lengths = _lengths(reader)
    parts = [f"<h2>{html.escape(name)}</h2>"]
    for file in modified_inputs(reader.prefix)[:5]:
        parts.append(f"<p class=note>{html.escape(file)} has changed since this dataset was prepared</p>")
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 0.99, 1])
    parts.append(
        "<p>Tokens per document: minimum {:,.0f}, 10th percentile {:,.0f}, median {:,.0f}, 90th percentile {:,.0f},"
        " 99th percentile {:,.0f}, maximum {:,.0f}</p>".format(*quantiles)
    )
    parts.append(_histogram(lengths))
    packing = [
        _packing_row(label, statistics(lengths[:_PACKED_LENGTHS], sequence_length, packed=packed))
        for label, packed in (("concatenated", False), ("best fit", True))
    ]
    heads = [f"in samples of {sequence_length:,}", "padding", "documents cut", "tokens after a cut"]
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
    """Yield the decoded beginnings of some documents, spread over the dataset."""
    for document in np.unique(np.linspace(0, reader.num_documents - 1, NUM_SAMPLES).astype(np.int64)):
        start, stop = (reader.document_start(int(document) + i) for i in (0, 1))
        yield tokenizer.decode(reader.tokens(start, min(stop, start + SAMPLE_TOKENS)).tolist())


def _lengths(reader: IndexedReader) -> np.ndarray:
    """Return the lengths of all documents in tokens, or of evenly spread runs of them if there are many."""
    count = reader.num_documents
    num_chunks = min(-(-count // _CHUNK), MAX_LENGTHS // _CHUNK)
    firsts = np.unique(np.linspace(0, max(count - _CHUNK, 0), num_chunks).astype(np.int64))
    if count <= num_chunks * _CHUNK:
        firsts = np.arange(0, count, _CHUNK)
    return np.concatenate([np.diff(reader.document_starts(f, min(f + _CHUNK, count))) for f in firsts.tolist()])


def _packing_row(label: str, found: Statistics) -> list[str]:
    """Return one row of the packing table."""
    shares = (found.truncated / max(found.tokens, 1), found.long_share)
    return [label, f"{found.padding:.2%}", f"{found.cut_documents:,}", *(f"{share:.2%}" for share in shares)]


def _histogram(lengths: np.ndarray) -> str:
    """Return an SVG bar chart of documents and tokens by length, in powers of two."""
    powers = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    documents, tokens = np.bincount(powers), np.bincount(powers, lengths)
    width, height, gap = 900, 150, 900 / len(documents)
    bars = []
    for row, (title, values) in enumerate((("documents", documents), ("tokens", tokens))):
        base = (row + 1) * (height + 40) - 20
        bars.append(f'<text x="0" y="{base - height - 5}">{title} by length in tokens</text>')
        for power, value in enumerate(values.tolist()):
            bar_height = height * value / max(values.max(), 1)
            title_text = f"{2**power:,} to {2 ** (power + 1) - 1:,}: {value:,.0f} {title}"
            bars.append(
                f'<rect class="bar" x="{power * gap + 1:.1f}" y="{base - bar_height:.1f}" width="{gap - 2:.1f}"'
                f' height="{bar_height:.1f}"><title>{title_text}</title></rect>'
            )
            bars.append(f'<text x="{power * gap + 2:.1f}" y="{base + 14}">{_short(2**power)}</text>')
    return f'<svg viewBox="0 0 {width} {2 * (height + 40)}" role="img">{"".join(bars)}</svg>'


def _short(count: int) -> str:
    """Return a count as a short label, in binary K or M."""
    return f"{count >> 20}M" if count >= 1 << 20 else f"{count >> 10}K" if count >= 1 << 10 else str(count)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table with escaped cells."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
