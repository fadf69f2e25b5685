"""Write a toy corpus of five sources from texts that ship with every Python, for demos and tests without a download."""

import ast
import hashlib
import importlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import read_text

SOURCES = ("web", "code", "books", "academic", "conversation")
MAX_CODE_CHARS = 3_000_000
"""Maximum number of characters of the source `code`."""

# Tests do not ship with every Python, and codec tables and generated parsers are of little use to a language model.
_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}
_EXCLUDED |= {"lib2to3", "lib-dynload"}
_PROMPT = ">>> "
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n){4,}", re.MULTILINE)


def write_toy_corpus(out_dir: str | Path, *, seed: int = 0) -> dict[str, Path]:
    """Write `<out_dir>/<source>.jsonl` for the five sources, about 6 MB in total.

    The same Python and seed produce the same bytes. The documents are shuffled, so that a validation split taken from
    the end has the same distribution as the training split.

    Returns:
        Source name -> file with one `{"text": ..., "source": ...}` per line.

    Raises:
        ConfigError: this Python has no source files of its standard library.
    """
    documents: dict[str, list[str]] = {name: [] for name in SOURCES}
    documents["books"] += _book_pages()
    for module, text, tree in modules():
        documents["code"].append(text)
        documents["academic"] += _essays(text, tree)
        documents["web"] += _reference_pages(module, tree)
        documents["conversation"] += _dialogues(tree)

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in SOURCES:
        # Ordered by a hash of the text: a document keeps its place relative to the others when some come or go.
        shuffled = sorted(set(documents[name]), key=lambda text: hashlib.sha256(f"{seed}{text}".encode()).digest())
        if name == "code":
            shuffled = _up_to(shuffled, MAX_CODE_CHARS)
        if not shuffled:
            raise ConfigError(
                f"toy corpus: this Python's library ({sysconfig.get_path('stdlib')}) contains no text for `{name}`.\n"
                "  Use a Python with its standard library as source files."
            )
        files[name] = out / f"{name}.jsonl"
        lines = [json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n" for text in shuffled]
        files[name].write_text("".join(lines), encoding="utf-8")
        print(f"{files[name]}: {len(lines)} documents, {files[name].stat().st_size / 1e6:.2f} MB", file=sys.stderr)
    return files


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """Yield name, text and syntax tree of each module of the standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _EXCLUDED)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix != ".py":
                continue
            try:
                text = read_text(path)
                tree = ast.parse(text)
            except (OSError, UnicodeDecodeError, SyntaxError):
                continue
            if len(text) >= 500:
                yield ".".join(path.relative_to(root).with_suffix("").parts), text, tree


def documented(node: ast.Module | ast.stmt) -> Iterator[tuple[ast.stmt, str]]:
    """Yield every documented class and function within a node with its docstring, in file order."""
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            doc := ast.get_docstring(child)
        ):
            yield child, doc
        yield from documented(child)


def _reference_pages(module: str, tree: ast.Module) -> list[str]:
    """Return pages of signatures with their docstrings, without doctests."""
    entries = []
    for node, docstring in documented(tree):
        if _PROMPT in docstring:
            continue
        signature = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
        name = getattr(node, "name", "")
        entries.append(f"{module}.{name}{signature}\n\n{docstring}")
    return _pages(entries)


def _essays(text: str, tree: ast.Module) -> list[str]:
    """Return pages of a module's docstring and its long comments."""
    blocks = [re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE) for block in _COMMENT_BLOCK.findall(text)]
    docstring = ast.get_docstring(tree) or ""
    return _pages([*([] if _PROMPT in docstring else [docstring]), *blocks])


def _dialogues(tree: ast.Module) -> list[str]:
    """Return pages of docstrings with interpreter sessions, including the text around them."""
    docstrings = [ast.get_docstring(tree) or "", *(text for _, text in documented(tree))]
    return _pages([text for text in docstrings if _PROMPT in text], page_chars=2_000, shortest=100)


def _book_pages() -> list[str]:
    """Return pages of Python's language reference and of the text files that ship with the standard library."""
    pages = []
    # `pydoc_data.topics` is generated and undocumented: a dictionary of long strings.
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        pages += _pages(topics[name].split("\n\n"))
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*root.glob("*.txt"), *root.glob("idlelib/*.txt"), *root.glob("email/*.rst")]):
        pages += _pages(read_text(path, "ignore").split("\n\n"))
    return pages


def _pages(paragraphs: list[str], *, page_chars: int = 6_000, shortest: int = 400) -> list[str]:
    """Join paragraphs in order into documents of about `page_chars`; a rest below `shortest` is added to the last."""
    pages: list[str] = []
    page = ""
    for paragraph in paragraphs:
        page += paragraph.strip("\n") + "\n\n"
        if len(page) >= page_chars:
            pages.append(page)
            page = ""
    if len(page) >= shortest:
        pages.append(page)
    elif pages:
        pages[-1] += page
    return [page.strip() + "\n" for page in pages]


def _up_to(documents: list[str], max_chars: int) -> list[str]:
    """Return the documents that fit into `max_chars`, in order."""
    kept, chars = [], 0
    for document in documents:
        if chars + len(document) <= max_chars:
            kept.append(document)
            chars += len(document)
    return kept
