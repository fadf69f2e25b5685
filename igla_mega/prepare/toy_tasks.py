"""What fine-tuning at laptop scale learns, from text that every Python ships: to write a function from its docstring,
to answer as the interpreter does, and to prefer Python that parses to Python that does not."""

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
"""Of what fits, with its turns' headers, into a laptop's rows of 256 tokens, as a rule."""
MAX_TURNS = 4
"""Questions of a dialogue."""


def write_instructions(file: Path, num_conversations: int, *, seed: int = 0) -> int:
    """Write conversations: docstring and signature -> function, and doctests as dialogues; returns how many.

    The same Python and seed give the same bytes, in shuffled order.
    """
    conversations = [_turns(asked, code) for asked, code in _functions()]
    conversations += list(_dialogues())
    return _write(file, [{"messages": messages} for messages in conversations], seed, num_conversations)


def write_preferences(file: Path, num_pairs: int, *, seed: int = 0) -> int:
    """Write pairs: of two functions for a docstring the one that parses is chosen; returns how many.

    What is rejected is the same function with one mistake, and `ast.parse` refuses it.
    """
    pairs: list[dict] = []
    for asked, code in sorted(_functions(), key=lambda pair: _order(seed, pair[1])):
        if len(pairs) == num_pairs:
            break
        if (broken := _broken(code, seed)) is not None:
            prompt, chosen = _turns(asked, code)
            pairs.append({"prompt": [prompt], "chosen": [chosen], "rejected": [{**chosen, "content": broken}]})
    return _write(file, pairs, seed, num_pairs)


def _turns(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _functions() -> Iterator[tuple[str, str]]:
    """What is asked for, and the function that does it, each once."""
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
    """Doctests: what is typed, and what the interpreter answers."""
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
    """The code with one mistake that keeps it from being parsed; None where none of the usual ones does."""
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
    lambda code: code[::-1].replace(")", "", 1)[::-1],  # the last bracket left open
    lambda code: re.sub(r"\n    (\S)", r"\n\1", code, count=1),  # the body not indented
    lambda code: code.replace("(", "[", 1),  # another bracket
    lambda code: re.sub(r"\breturn (\S+)", r"\1 return", code, count=1),  # words the wrong way round
    lambda code: re.sub(r" = ", " = = ", code, count=1),
)


def _order(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}{text}".encode()).digest()


def _write(file: Path, entries: list[dict], seed: int, at_most: int) -> int:
    lines = sorted({json.dumps(entry, ensure_ascii=False) for entry in entries}, key=lambda line: _order(seed, line))
    lines = lines[:at_most]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{file}: {len(lines)} lines, {file.stat().st_size / 1e6:.2f} MB", file=sys.stderr)
    return len(lines)
