"""The card's five sources, from text that every Python ships: for demos and tests, without a download."""

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

SOURCES = ("web", "code", "books", "academic", "conversation")
MAX_CODE_CHARS = 3_000_000

# Tests are not shipped everywhere; tables of codecs and generated parsers teach a language model little.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}
_LEFT_OUT |= {"lib2to3", "lib-dynload"}
_ASKS = ">>> "
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n){4,}", re.MULTILINE)


def write_toy_corpus(out_dir: str | Path, *, seed: int = 0) -> dict[str, Path]:
    """Write `<out_dir>/<source>.jsonl` for the five sources, about 6 MB in all.

    The same Python and seed give the same bytes. Documents lie in shuffled order, so that a validation set cut off the
    end is drawn like the training set.

    Returns:
        Source name -> file, one `{"text": ..., "source": ...}` per line.
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
        shuffled = sorted(set(documents[name]), key=lambda text: hashlib.sha256(f"{seed}{text}".encode()).digest())
        if name == "code":
            shuffled = _up_to(shuffled, MAX_CODE_CHARS)
        if not shuffled:
            raise ConfigError(
                f"toy corpus: this Python's library ({sysconfig.get_path('stdlib')}) has no text for `{name}`.\n"
                "  Use a Python with its standard library as source files."
            )
        files[name] = out / f"{name}.jsonl"
        lines = [json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n" for text in shuffled]
        files[name].write_text("".join(lines), encoding="utf-8")
        print(f"{files[name]}: {len(lines)} documents, {files[name].stat().st_size / 1e6:.2f} MB", file=sys.stderr)
    return files


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """Name, text and syntax tree of each module of the standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _LEFT_OUT)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix != ".py":
                continue
            try:
                text = path.read_text(encoding="utf-8")
                tree = ast.parse(text)
            except (OSError, UnicodeDecodeError, SyntaxError):
                continue
            if len(text) >= 500:
                yield ".".join(path.relative_to(root).with_suffix("").parts), text, tree


def documented(node: ast.Module | ast.stmt) -> Iterator[tuple[ast.stmt, str]]:
    """Every class and function below a node that has a docstring, in the order of the file."""
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            doc := ast.get_docstring(child)
        ):
            yield child, doc
        yield from documented(child)


def _reference_pages(module: str, tree: ast.Module) -> list[str]:
    entries = []
    for node, docstring in documented(tree):
        if _ASKS in docstring:
            continue
        signature = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
        name = getattr(node, "name", "")
        entries.append(f"{module}.{name}{signature}\n\n{docstring}")
    return _pages(entries)


def _essays(text: str, tree: ast.Module) -> list[str]:
    """A module's own explanation and the long comments of its authors."""
    blocks = [re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE) for block in _COMMENT_BLOCK.findall(text)]
    docstring = ast.get_docstring(tree) or ""
    return _pages([*([] if _ASKS in docstring else [docstring]), *blocks])


def _dialogues(tree: ast.Module) -> list[str]:
    """Docstrings in which someone asks the interpreter and it answers, explanations included."""
    docstrings = [ast.get_docstring(tree) or "", *(text for _, text in documented(tree))]
    return _pages([text for text in docstrings if _ASKS in text], page_chars=2_000, shortest=100)


def _book_pages() -> list[str]:
    """Python's own language reference, and the licences, histories and read-me files that lie beside the library."""
    pages = []
    # `topics` is a generated module of no public interface: a dict of long strings.
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        pages += _pages(topics[name].split("\n\n"))
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*root.glob("*.txt"), *root.glob("idlelib/*.txt"), *root.glob("email/*.rst")]):
        pages += _pages(path.read_text(encoding="utf-8", errors="ignore").split("\n\n"))
    return pages


def _pages(paragraphs: list[str], *, page_chars: int = 6_000, shortest: int = 400) -> list[str]:
    """Join paragraphs, in order, into documents of about `page_chars`; a rest below `shortest` joins the last one."""
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
    kept, chars = [], 0
    for document in documents:
        if chars + len(document) <= max_chars:
            kept.append(document)
            chars += len(document)
    return kept
