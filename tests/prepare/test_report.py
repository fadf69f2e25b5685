import json
from types import SimpleNamespace

import numpy as np

from igla_mega.data.document_packing import statistics
from igla_mega.data.indexed import IndexedReader
from igla_mega.prepare.report import write_report
from igla_mega.prepare.sources import prepare_sources


def test_the_page_tells_counts_lengths_samples_and_duplicates(texts, tokenizer, tmp_path):
    lines = [json.dumps({"text": text, "lang": "de" if i % 3 else "en"}) for i, text in enumerate([*texts, "<b>&"])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = SimpleNamespace(
        sources={"web": str(tmp_path / "a.jsonl")},
        mix={"web": 1.0},
        tokenizer=tokenizer.path,
        prepared=str(tmp_path / "prepared"),
        text_key="text",
        language_key="lang",
        skip_broken_lines=False,
        workers=1,
        cleaning=SimpleNamespace(exact_duplicates=True),
    )
    prefix = prepare_sources(data, progress=False)["web"]
    page = write_report(data, 64).read_text()
    reader = IndexedReader(prefix)
    distinct = len(set(texts)) + 1
    assert reader.num_documents == distinct
    assert f"<td>{reader.num_documents:,}</td><td>{reader.num_tokens:,}</td><td>100.0%</td>" in page
    assert f"<td>duplicate</td><td>{len(texts) + 1 - distinct:,}</td>" in page
    assert "&lt;b&gt;&amp;" in page, "the last document is among the samples, and is no markup"
    assert "<td>de</td>" in page
    bytes_per_token = sum(len(text.encode()) for text in {*texts, "<b>&"}) / reader.num_tokens
    assert f"<td>{bytes_per_token:.2f}</td>" in page
    found = statistics(np.diff(reader.document_starts(0, reader.num_documents)), 64, packed=True)
    assert f"<td>best fit</td><td>{found.padding:.2%}</td>" in page
    assert "has changed since" not in page
    (tmp_path / "a.jsonl").write_text("changed")
    assert "has changed since" in write_report(data, 64).read_text()
