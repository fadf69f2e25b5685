"""One rule for names that become files or lines, and one way to print text that a user gave."""

import re
import unicodedata

MAX_LENGTH = 100
"""Maximum length of a name, in characters: most file systems take 255 bytes, and prefixes and suffixes are added."""
_NAME = re.compile(r"\w[\w .+-]*", re.UNICODE)
_CHARACTERS = "letters, digits, and `_ . + -` or spaces behind the first character"


def name_error(name: str) -> str | None:
    """Return why a name cannot be used as a file name and printed as it is, or None if it can."""
    if not name:
        return "is empty. Give a name"
    if len(name) > MAX_LENGTH:
        return f"has {len(name)} characters; use at most {MAX_LENGTH}"
    if not _NAME.fullmatch(name) or name[-1] in " ." or unicodedata.normalize("NFC", name) != name:
        return f"cannot name a file. Use {_CHARACTERS}"
    return None


def safe_name(text: str) -> str:
    """Return a valid name close to `text`, which may be the name of a file or folder of any kind."""
    text = unicodedata.normalize("NFC", text)
    plain = re.sub(r"[^\w .+-]", "_", text)[:MAX_LENGTH].strip(" .")
    return plain if plain and _NAME.fullmatch(plain) else f"_{plain}"[:MAX_LENGTH].rstrip(" .")


def printable(text: str) -> str:
    """Return text that is safe to print: all but letters, signs, spaces, newline and tab is shown as escapes.

    Escape sequences would reach the terminal, and marks of direction let a name pose as a message of ours.
    """
    return "".join(
        char if char in "\n\t" or char.isprintable() or unicodedata.category(char) == "Zs" else ascii(char)[1:-1]
        for char in text
    )
