"""Write toy data for fine-tuning from texts that ship with every Python.

Instructions: write a function from its docstring, and answer like the interpreter. Preferences: a function that parses
over one that does not.
"""

import ast
import doctest
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from igla_mega.prepare.toy_corpus import documented, modules

MAX_FUNCTION_CHARS, MAX_DOCSTRING_CHARS = 420, 240
"""Maximum lengths in characters; with turn headers most samples then fit into rows of 256 tokens."""
MAX_TURNS = 4
"""Maximum number of questions per dialogue."""


def write_instructions(file: Path, num_conversations: int, *, seed: int = 0) -> int:
    """Write conversations (docstring and signature to function, and doctests as dialogues) and return their number.

    The same Python and seed produce the same bytes, in shuffled order.
    """
    conversations = [_turns(request, code) for request, code in _functions()]
    conversations += list(_dialogues())
    return _write(file, [{"messages": messages} for messages in conversations], seed, num_conversations)


def write_preferences(file: Path, num_pairs: int, *, seed: int = 0) -> int:
    """Write preference pairs and return their number.

    The chosen answer is a function; the rejected one is the same function with one mistake that `ast.parse` rejects.
    """
    pairs: list[dict] = []
    for request, code in sorted(_functions(), key=lambda pair: _order(seed, pair[1])):
        if len(pairs) == num_pairs:
            break
        if (broken := _broken(code, seed)) is not None:
            prompt, chosen = _turns(request, code)
            pairs.append({"prompt": [prompt], "chosen": [chosen], "rejected": [{**chosen, "content": broken}]})
    return _write(file, pairs, seed, num_pairs)


def _turns(request: str, answer: str) -> list[dict[str, str]]:
    """Return a user turn and an assistant turn."""
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def _functions() -> Iterator[tuple[str, str]]:
    """Yield each short documented function once, as (request, code)."""
    seen: set[str] = set()
    for _, _, tree in modules():
        for node, docstring in documented(tree):
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
                continue
            summary = docstring.split("\n\n")[0]
            bare = ast.FunctionDef(**{**vars(node), "body": node.body[1:], "decorator_list": []})
            code = ast.unparse(ast.fix_missing_locations(bare))
            if len(code) > MAX_FUNCTION_CHARS or len(summary) > MAX_DOCSTRING_CHARS or code in seen:
                continue
            seen.add(code)
            yield f"Write {node.name}({ast.unparse(node.args)}): {summary}", code


def _dialogues() -> Iterator[list[dict[str, str]]]:
    """Yield doctests as dialogues: the input as the user's turn, the interpreter's output as the answer."""
    parser = doctest.DocTestParser()
    for _, _, tree in modules():
        for _, docstring in documented(tree):
            try:
                examples = [e for e in parser.get_examples(docstring) if e.want.strip()]
            except ValueError:
                continue
            for first in range(0, len(examples), MAX_TURNS):
                turns = [_turns(e.source.rstrip(), e.want.rstrip()) for e in examples[first : first + MAX_TURNS]]
                if sum(len(turn["content"]) for pair in turns for turn in pair) <= MAX_FUNCTION_CHARS:
                    yield [turn for pair in turns for turn in pair]


def _broken(code: str, seed: int) -> str | None:
    """Return the code with one mistake that prevents parsing, or None if none of the known mistakes does."""
    first = int.from_bytes(hashlib.sha256(f"{seed}{code}".encode()).digest()[:4], "big")
    for turn in range(len(_MISTAKES)):
        broken = _MISTAKES[(first + turn) % len(_MISTAKES)](code)
        if broken != code:
            try:
                ast.parse(broken)
            except SyntaxError:
                return broken
    return None


_MISTAKES: tuple[Callable[[str], str], ...] = (
    lambda code: re.sub(r":\n", "\n", code, count=1),  # no colon
    lambda code: code[::-1].replace(")", "", 1)[::-1],  # last parenthesis not closed
    lambda code: re.sub(r"\n    (\S)", r"\n\1", code, count=1),  # body not indented
    lambda code: code.replace("(", "[", 1),  # wrong kind of bracket
    lambda code: re.sub(r"\breturn (\S+)", r"\1 return", code, count=1),  # words swapped
    lambda code: re.sub(r" = ", " = = ", code, count=1),  # operator twice
)


def _order(seed: int, text: str) -> bytes:
    """Return a sort key that shuffles texts by the seed."""
    return hashlib.sha256(f"{seed}{text}".encode()).digest()


def _write(file: Path, entries: list[dict], seed: int, at_most: int) -> int:
    """Write entries as shuffled JSON lines without repetitions; return the number of lines."""
    lines = sorted({json.dumps(entry, ensure_ascii=False) for entry in entries}, key=lambda line: _order(seed, line))
    lines = lines[:at_most]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{file}: {len(lines)} lines, {file.stat().st_size / 1e6:.2f} MB", file=sys.stderr)
    return len(lines)
