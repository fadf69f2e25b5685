"""Read the forms in which data sets write conversations, and refuse what would otherwise be dropped.

Accepted forms of a line:
    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": text}, ...]}
    {"conversations": [{"from": "system" | "human" | "gpt" | "tool", "value": text}, ...]} (ShareGPT)
    {"prompt": text, "completion": text}, or both as lists of messages; only the completion is a target
    {"instruction": text, "input": text, "output": text}, input optional (Alpaca)

Further keys of a line: `tools`, rendered by the chat template, and `system`, the text of a first system turn. Further
keys of a turn: `tool_calls`, `reasoning_content`, `reasoning` or `thinking`, and `weight: 0` or `train: false` for an
assistant's turn that is not a target. `HARMLESS` lists the keys that are ignored; any other key is refused by name. A
key whose value is null or empty counts as absent.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn under which data sets keep what the assistant wrote before its answer."""
HARMLESS = frozenset(
    """
    id ids uid uuid guid idx index hash name type source sources dataset dataset_name origin subset split category
    categories domain subject topic title task task_type task_name tags language lang locale license url link timestamp
    date time created created_at updated_at model model_name generator author annotator annotator_id user user_id
    username avatarUrl views conversation_id conversation_hash message_id prompt_id prompt_hash turn turns num_turns
    num_tokens length quality difficulty rating ratings score scores score_chosen score_rejected chosen_score
    rejected_score chosen_rating rejected_rating chosen_model rejected_model chosen_avg_rating rejected_avg_rating
    metadata meta comment comments notes redacted toxic moderation openai_moderation
    """.split()  # noqa: SIM905 (a list of strings would fill a page)
)
"""Keys of a line or a turn that say nothing about its text, also with `-` for `_`; ignored."""

_SHARE_GPT = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}
_FORM_KEYS = frozenset({"messages", "conversations", "prompt", "completion", "instruction", "input", "output"})
_TURN_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "weight", "train", *REASONING})
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation, and which of them are targets."""

    messages: list[Message]
    trained: tuple[int, ...]
    """Places of the assistant's turns that are targets, from 0, ascending."""
    tools: list[Any] | None = None
    """Descriptions of the functions that the assistant may call, for the chat template."""


def conversation_of(line: Mapping[str, Any], place: str) -> Conversation | tuple[str, str]:
    """Return the conversation of one line, or its plain prompt and completion.

    Args:
        place: `file:line` for the errors.

    Raises:
        ConfigError: the line has no accepted form, its turns are not in order, or a key would be dropped.
    """
    entry = present(line, _FORM_KEYS)
    if "messages" in entry or "conversations" in entry:
        return _of_turns(entry, place)
    if "prompt" in entry and "completion" in entry:
        return _of_completion(entry, place)
    if "instruction" in entry and "output" in entry:
        refuse_unknown(entry, ("instruction", "input", "output", "system", "tools", "text"), place)
        parts = [entry["instruction"], entry.get("input", "")]
        if not all(isinstance(part, str) for part in parts):
            raise ConfigError(f"{place}: instruction or input is not a text.\n  Fix or remove the line.")
        asked = {"role": "user", "content": "\n".join(filter(None, parts))}
        return conversation([asked, {"role": "assistant", "content": entry["output"]}], place, entry)
    known = "`messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`"
    keys = ", ".join(sorted(entry)) or "none"
    raise ConfigError(
        f"{place}: not a conversation: its keys are {keys}.\n  Use {known}"
        + ("; `chosen` and `rejected` are for `dpo:`." if "chosen" in entry else ".")
    )


def _of_turns(entry: Mapping[str, Any], place: str) -> Conversation:
    """Return the conversation of a line of turns."""
    key = "messages" if "messages" in entry else "conversations"
    refuse_unknown(entry, (key, "system", "tools", "prompt"), place)
    found = conversation(entry[key], place, entry)
    if "prompt" in entry:
        refuse_other_prompt(entry["prompt"], found.messages, place)
    return found


def _of_completion(entry: Mapping[str, Any], place: str) -> Conversation | tuple[str, str]:
    """Return the conversation of a prompt and a completion, which alone is a target."""
    prompt, completion = entry["prompt"], entry["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        refuse_unknown(entry, ("prompt", "completion", "system", "tools"), place)
        return conversation([*prompt, *completion], place, entry, first=len(prompt))
    if isinstance(prompt, str) and isinstance(completion, str) and completion:
        refuse_unknown(entry, ("prompt", "completion"), place)
        refuse_surrogates(prompt + completion, place)
        return prompt, completion
    raise ConfigError(
        f"{place}: prompt and completion are not both texts or both lists of messages.\n  Fix or remove the line."
    )


def conversation(given: Any, place: str, entry: Mapping[str, Any], *, first: int = 0) -> Conversation:
    """Return a conversation after checking its turns.

    Args:
        entry: the line, for its `system` and `tools`.
        first: number of turns, from the beginning, that are no targets.

    Raises:
        ConfigError: the turns are malformed or out of order, or none of them is a target.
    """
    messages = checked(given, place)
    if "system" in entry:
        if messages[0]["role"] == "system" or not isinstance(entry["system"], str):
            raise ConfigError(f"{place}: `system` beside a system turn, or not a text.\n  Keep one of the two.")
        messages, first = [{"role": "system", "content": entry["system"]}, *messages], first and first + 1
        refuse_surrogates(entry["system"], place)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ConfigError(f"{place}: no turn by the assistant, so there are no targets.\n  Remove the line.")
    trained = tuple(i for i in answers if i >= first and _is_trained(messages[i]))
    if not trained:
        raise ConfigError(
            f"{place}: no turn by the assistant is a target: all have `weight: 0` or `train: false`, or belong to the "
            "prompt.\n  Remove the line."
        )
    kept = [{key: message[key] for key in message if key not in ("weight", "train")} for message in messages]
    return Conversation(kept, trained, tools_of(entry, place))


def checked(given: Any, place: str) -> list[Message]:
    """Return turns in one form after checking their order.

    The order is an optional system text, then user and assistant alternately, with any number of answers of tools after
    an assistant's turn.

    Raises:
        ConfigError: the turns are malformed or out of order.
    """
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{place}: messages: not a list of turns.\n  Fix or remove the line.")
    messages = [_turn(one, f"{place}: turn {number}") for number, one in enumerate(given, 1)]
    for number, message in enumerate(messages, 1):
        turn, role, before = f"{place}: turn {number}", message["role"], messages[number - 2]["role"]
        if role == "system" and number > 1:
            raise ConfigError(f"{turn}: system text after the first turn.\n  Move it to the start.")
        if role == "tool" and (number == 1 or before not in ("assistant", "tool")):
            raise ConfigError(f"{turn}: a tool's answer that does not follow a call.\n  Fix or remove the line.")
        if number > 1 and role == before != "tool":
            raise ConfigError(f"{turn}: two turns in a row by the {role}.\n  Join them, or remove one.")
    return messages


def _turn(given: Any, place: str) -> Message:
    """Return one turn with the keys `role` and `content`, after checking its keys."""
    if not isinstance(given, dict):
        raise ConfigError(f'{place}: not a {{"role": ..., "content": text}}.\n  Fix or remove the line.')
    message = present(given, ("content", "value"))
    if "from" in message and "role" not in message:
        role = message.pop("from")
        message = {"role": _SHARE_GPT.get(role, role) if isinstance(role, str) else role, **message}
        if "value" in message:
            message["content"] = message.pop("value")
    role, content = message.get("role"), message.get("content")
    if content is None and message.keys() & {"tool_calls", *REASONING}:
        message["content"] = None
    elif isinstance(content, list):
        raise ConfigError(f"{place}: its content is a list of parts, not a text.\n  Join the texts of the parts.")
    elif not isinstance(content, str):
        raise ConfigError(f'{place}: not a {{"role": ..., "content": text}}.\n  Fix or remove the line.')
    refuse_surrogates(content or "", place)
    if role not in ROLES:
        raise ConfigError(f"{place}: role {role!r} is not one of {', '.join(ROLES)}.\n  Fix or remove the line.")
    refuse_unknown(message, _TURN_KEYS, place)
    if any(not isinstance(message[key], str) for key in REASONING if key in message):
        raise ConfigError(f"{place}: its reasoning is not a text.\n  Fix or remove the line.")
    list(_calls(message, place))
    if role != "assistant" and (_is_trained(message, False, place) or message.keys() & {"tool_calls", *REASONING}):
        raise ConfigError(
            f"{place}: `weight`, `train`, `tool_calls` or reasoning of a turn that is not the assistant's.\n"
            "  Remove the key; only turns of the assistant are targets."
        )
    _is_trained(message, True, place)
    return message


def _is_trained(message: Message, default: bool = True, place: str = "") -> bool:
    """Return False for a turn with `weight: 0` or `train: false`."""
    given = {key: message[key] for key in ("weight", "train") if key in message}
    for key, value in given.items():
        if value not in (0, 1) or (len(given) == 2 and given["weight"] != given["train"]):
            raise ConfigError(
                f"{place}: `{key}` is {value!r}, not 0 or 1, or `weight` and `train` differ.\n"
                "  Use weight 0 (train false) or 1 (train true)."
            )
    return bool(next(iter(given.values()), default))


def _calls(message: Message, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and arguments of each call of a tool."""
    calls = message.get("tool_calls", [])
    for call in calls if isinstance(calls, list) else [None]:
        function = _function(call)
        if not function:
            raise ConfigError(
                f"{place}: tool_calls: not a list of "
                '{"type": "function", "function": {"name": ..., "arguments": ...}}.\n  Fix or remove the line.'
            )
        yield function["name"], function.get("arguments")


def tools_of(entry: Mapping[str, Any], place: str) -> list[Any] | None:
    """Return the descriptions of functions of a line, which may be written as a JSON text."""
    tools = entry.get("tools")
    if isinstance(tools, str):
        try:
            tools = json_text.loads(tools) or None
        except ValueError as error:
            raise ConfigError(f"{place}: tools: not JSON ({error}).\n  Fix or remove the line.") from None
    if tools is not None and not (isinstance(tools, list) and all(map(_function, tools))):
        raise ConfigError(f"{place}: tools: not a list of functions with a name.\n  Fix or remove the line.")
    return tools


def _function(tool: Any) -> dict[str, Any]:
    """Return the function of a tool or of a call, empty if it has no name."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return {}
    return function if function["name"] else {}


def present(entry: Mapping[str, Any], kept: Collection[str] = ()) -> dict[str, Any]:
    """Return an object without the keys that are null, or empty and not among those to keep."""
    empty: tuple[Any, ...] = ("", [], {})
    return {k: v for k, v in entry.items() if v is not None and (k in kept or not any(v == e for e in empty))}


def refuse_unknown(entry: Mapping[str, Any], known: Collection[str], place: str) -> None:
    """Raise ConfigError naming a key that is neither used nor harmless."""
    if unknown := [key for key in entry if key not in known and key.replace("-", "_") not in HARMLESS]:
        raise ConfigError(
            f"{place}: {unknown[0]!r} would be dropped: this form uses {', '.join(sorted(known))}.\n"
            "  Remove the key if it is not to be learned from, or write its content into the turns."
        )


def refuse_other_prompt(prompt: Any, messages: Sequence[Message], place: str) -> None:
    """Raise ConfigError if a `prompt` beside messages is not the text of one of the user's turns."""
    users = {message["content"].strip() for message in messages if message["role"] == "user"}
    if not isinstance(prompt, str) or prompt.strip() not in users:
        raise ConfigError(
            f"{place}: `prompt` would be dropped: it is not the text of a user's turn.\n"
            "  Remove it, or write it into the turns."
        )


def refuse_surrogates(text: str, place: str) -> None:
    """Raise ConfigError on an unpaired surrogate, which JSON escapes can express and no tokenizer accepts."""
    if not text.isascii() and _SURROGATE.search(text):
        raise ConfigError(f"{place}: contains half of a surrogate pair (invalid Unicode).\n  Fix or remove the line.")


def text_end(part: str, text: str) -> int:
    """Return the offset after the first occurrence of a part in a text, or -1; white space is not compared."""
    part = part.strip()
    if (found := text.find(part)) >= 0:
        return found + len(part)
    squeezed = "".join(part.split())
    places = [i for i, character in enumerate(text) if not character.isspace()]
    found = "".join(text[i] for i in places).find(squeezed)
    return places[found + len(squeezed) - 1] + 1 if found >= 0 else -1


def lost_part(message: Message, text: str, *, trained: bool) -> str | None:
    """Return the key of the part of a turn that is not in its rendered text, or None.

    Args:
        trained: True to search all that the assistant wrote. In a turn that is only context, templates drop reasoning
            on purpose, and the rest is searched.
    """
    content = message["content"] or ""
    if message["role"] == "assistant" and not trained:
        content = content.rpartition("</think>")[2]
    parts = [("content", content)]
    if trained:
        parts += [(key, message[key]) for key in REASONING if key in message]
    for name, arguments in _calls(message):
        whole = isinstance(arguments, str) and _stands(arguments, text)
        parts += [("tool_calls", leaf) for leaf in (name, *([] if whole else _leaves(_parsed(arguments))))]
    return next((key for key, part in parts if not _stands(part, text)), None)


def lost_tool(tools: Sequence[Any] | None, text: str) -> bool:
    """Return True if the name, description or a parameter of a function is not in a rendered text."""
    for function in map(_function, tools or ()):
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        names = [*properties] if isinstance(properties, dict) else []
        parts = [function["name"], function.get("description") or "", *names]
        if not all(_stands(str(part), text) for part in parts):
            return True
    return False


def _stands(part: str, text: str) -> bool:
    """Return True if a text has a part, as it is or with the escapes of JSON."""
    return any(
        text_end(form, text) >= 0
        for form in dict.fromkeys((part, *(json.dumps(part, ensure_ascii=flag)[1:-1] for flag in (False, True))))
    )


def _parsed(arguments: Any) -> Any:
    """Return the arguments of a call, which may be written as a JSON text; the text if they are not JSON."""
    try:
        return json_text.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _leaves(value: Any) -> Iterator[str]:
    """Yield the keys, texts and numbers of a JSON value."""
    left = [value]  # not recursive: a value may be nested more deeply than Python's calls
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
        elif isinstance(one, str | int | float) and not isinstance(one, bool):
            yield str(one)
