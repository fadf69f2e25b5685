"""File name suffixes of the raw text formats, plain and compressed."""

LINES, TEXT, ROWS = "lines", "text", "rows"
KINDS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), LINES),
    **dict.fromkeys((".txt", ".text"), TEXT),
    **dict.fromkeys((".parquet", ".arrow", ".feather"), ROWS),
}
PACKED = (".gz", ".zst", ".bz2", ".xz")
SUFFIXES = (*KINDS, *(kind + packed for kind, form in KINDS.items() if form != ROWS for packed in PACKED))
