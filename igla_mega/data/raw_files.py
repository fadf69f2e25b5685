"""File name suffixes of the raw text formats, plain and compressed."""

LINES, TEXT, ROWS = "lines", "text", "rows"
KINDS = {".jsonl": LINES, ".json": LINES, ".ndjson": LINES, ".txt": TEXT, ".text": TEXT, ".parquet": ROWS}
PACKED = (".gz", ".zst", ".bz2", ".xz")
SUFFIXES = (*KINDS, *(kind + packed for kind, form in KINDS.items() if form != ROWS for packed in PACKED))
