#!/usr/bin/env python
"""Refuse words that make errors, comments and pages hard to read; print each place with a plain alternative.

    python tools/words.py            # the whole project: comments, docstrings and texts of the code, and all pages

A line may keep such a word, as a quotation or the name of another program's option, by ending in `plain-words: keep`.
"""

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS = {
    r"mend(s|ed|ing)?": "fix, repair",
    r"begin of": "beginning of, start of",
    r"leap(s|t|ed)?": "spike, jump",
    r"its rights": "its permissions",
    r"(was|were|is|are|be|been) told|told (by|of|to)": "given, received, reported",
    r"goes on|gone on|going on with|goes? on with": "continues, resumes",
    r"taken up again|takes? up again": "resumed",
    r"anew": "again, from scratch",
    r"at hand": "current",
    r"in words": "with a message",
    r"nobody said|what nobody": "assumed",
    r"in its sleep": "while it sleeps",
    r"whoever": "the process that, the user who",
    r"would be lost": "would be overwritten",
    r"is there already": "already exists",
    r"was never finished": "is incomplete",
    r"lies beside|lie beside|lying beside": "is stored next to",
    r"hands? on": "passes",
    r"is meant": "is selected, is intended",
    r"as it stands": "in its current state",
    r"so many (times|of|tokens|steps|ranks|ids)": "N",
    r"what (it|he|she|this) knows of": "what it has",
    r"without a word": "silently",
    r"thereof|whereof|therein|hitherto|henceforth": "a plain phrase",
    r"aloud": "with a message",
    r"by hand": "manually",
    r"gives? back": "returns",
}
"""Pattern -> what to write instead. Whole words, any case."""
PATTERN = re.compile("|".join(rf"(?P<w{i}>\b(?:{pattern})\b)" for i, pattern in enumerate(WORDS)), re.IGNORECASE)
SUGGESTIONS = list(WORDS.values())
KEEP = "plain-words: keep"
SKIP = ("tools/words.py", "tests/tools/test_words.py", "tests/data/", "igla_mega/report/assets/uPlot", "bench/results/")
"""This list itself, and files that others wrote."""


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listed.stdout.splitlines() if not name.startswith(SKIP) and (ROOT / name).is_file()]
    found = [line for name in names for line in breaches(name, (ROOT / name).read_text(errors="replace"))]
    print("\n".join(found))
    return 1 if found else 0


def breaches(name: str, text: str) -> Iterator[str]:
    """Yield a line for each unusual word in what a person reads of a file."""
    lines = text.splitlines()
    for number, prose in prose_of(name, text):
        for match in PATTERN.finditer(prose):
            line = number + prose.count("\n", 0, match.start())
            if line <= len(lines) and KEEP in lines[line - 1]:
                continue
            suggestion = SUGGESTIONS[int(match.lastgroup[1:])] if match.lastgroup else ""
            yield f"{name}:{line}: `{' '.join(match[0].split())}`: write {suggestion}"


def prose_of(name: str, text: str) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of each piece of prose: comments, docstrings and other literals, or pages."""
    if name.endswith(".py"):
        try:
            for token in tokenize.generate_tokens(io.StringIO(text).readline):
                if token.type in (tokenize.COMMENT, tokenize.STRING):
                    yield token.start[0], token.string
        except (tokenize.TokenError, IndentationError):
            return  # ruff reports it
    elif name.endswith((".cpp", ".cu", ".cuh", ".h", ".js", ".css")):
        for number, line in enumerate(text.splitlines(), 1):
            if (comment := re.search(r"//.*|/\*.*|^\s*\*.*|\"[^\"]*\"", line)) is not None:
                yield number, comment[0]
    elif name.endswith((".md", ".yaml", ".yml", ".sh", ".sbatch", ".toml", ".html", "Makefile", "Dockerfile")):
        yield 1, text


if __name__ == "__main__":
    sys.exit(main())
