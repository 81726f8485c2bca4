"""Rows of training data, recognised by their keys.

    messages or conversations        a conversation, in `role`/`content` or in ShareGPT's `from`/`value`; also `tools`
    instruction, output              Alpaca: also `input`, which follows the instruction, `system`, and `history`,
                                     a list of earlier [instruction, output] pairs
    prompt, completion               two strings, or two lists of messages
    text                             a plain text, learned whole

Whichever of these comes first in this list decides. Every malformed row is an error that names its file and line:
a row that silently disappears, or is learned as something else, is found out too late.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from minilora.data.files import find_files, read_files
from minilora.data.json_values import parse_json
from minilora.data.tables import table_rows
from minilora.errors import InputError
from minilora.progress import with_progress
from minilora.text import Message

T = TypeVar("T")
R = TypeVar("R")

ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
FOLLOWS = {  # the roles that a message of each role may come after; None is the beginning
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
SHOWN = 5  # malformed rows quoted in an error


@dataclass(frozen=True)
class Row:
    """One row: a conversation that ends with an answer, or a plain text.

    Attributes:
        messages: dicts with `role`, `content` and whatever else the chat template reads; None for a plain text.
        text: the plain text, learned whole; None for a conversation.
        tools: JSON schemas of the functions that the conversation may call.
        context: the number of leading messages that are only read, even where they are the assistant's.
        pair: the conversation was two strings, prompt and completion: without a chat template they are joined.
        source: where the row comes from, such as "file.jsonl:12".
        meta: the row as it was.
    """

    messages: list[Message] | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None
    context: int = 0
    pair: bool = False
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


# names of files and patterns of them; Rows or dicts, of any iterable; a DataFrame, a datasets.Dataset, a pyarrow.Table
Rows = str | Path | Iterable[str | Path] | Iterable[Row] | Iterable[dict[str, Any]] | Iterable[Any]


def load_rows(files: str | Path | Iterable[str | Path]) -> list[Row]:
    """Read the rows of files: .json, .jsonl, .csv, .tsv or .parquet, the first four also as .gz or .zst.

    A row is recognised by its keys: `messages` or `conversations` (OpenAI's or ShareGPT's form of a conversation);
    `instruction` and `output` (Alpaca); `prompt` and `completion`; or `text`.

    Args:
        files: a file's name, a pattern such as "data/*.jsonl", or several of them; texts are in UTF-8.

    Returns:
        The rows in the files' order, those of a pattern sorted by name.

    Raises:
        InputError: a file cannot be read or holds no rows, or rows are malformed: how many, and for the first few
            the file, the line and what is wrong.
    """
    if isinstance(files, Mapping):
        raise InputError("load_rows takes names of files; with weights, they go through mix_rows")
    return collect(read_files(find_files([files] if isinstance(files, str | Path) else files)))


def as_rows(values: Iterable[Any]) -> list[Row]:
    """The same from dicts in memory; their sources are "row 1", "row 2", ... InputError as `load_rows`."""
    return collect((f"row {number}", value) for number, value in enumerate(values, start=1))


def given_rows(rows: Rows, what: str) -> list[Row]:
    """The rows of whatever a caller gave; `what` they are, such as "training", is named in errors.

    Raises InputError where there are none, they are not all of a kind, or as `load_rows` does.
    """
    if isinstance(rows, str | Path):
        return load_rows(rows)
    # A DataFrame iterates over the names of its columns, which would be taken for files: tables come first.
    table = table_rows(rows)
    given: list[Any] = list(table if table is not None else rows if isinstance(rows, Iterable) else [rows])
    kinds = {type(row) for row in given}
    if not given:
        raise InputError(f"there are no {what} rows")
    if table is not None or kinds == {dict}:
        return as_rows(given)
    if isinstance(rows, Mapping):
        raise InputError(f"{what} rows are a list of dicts, not one dict; files with weights go through mix_rows")
    if kinds == {Row}:
        return given
    if all(isinstance(row, str | Path) for row in given):
        return load_rows(given)
    names = " and ".join(sorted(kind.__name__ for kind in kinds))
    raise InputError(f"{what} rows must be a path, or all dicts or all Rows, not {names}")


def collect(values: Iterable[tuple[str, Any]]) -> list[Row]:
    """Recognise (source, value) pairs; a value may be an InputError, met while reading it."""
    pairs = with_progress(values, None, "Reading", "rows")
    return each(pairs, lambda pair: pair[0], lambda pair: as_row(pair[1], pair[0]))


def each(items: Iterable[T], source: Callable[[T], str], function: Callable[[T], R]) -> list[R]:
    """Apply a function to all items; if it refuses any, raise one InputError that counts them and quotes a few."""
    results: list[R] = []
    bad: list[str] = []
    for item in items:
        try:
            results.append(function(item))
        except InputError as error:
            bad.append(f"{source(item)}: {error}")
    if bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        total = len(bad) + len(results)
        raise InputError(f"{len(bad)} of {total} rows cannot be used: {'; '.join(bad[:SHOWN])}{more}")
    return results


# From a JSON value to a row


def as_row(value: Any, source: str = "") -> Row:
    """Recognise one row by its keys; raise InputError where it has none of them, is malformed, or is an InputError."""
    if isinstance(value, InputError):
        raise value
    if not isinstance(value, dict):
        raise InputError(f"a row is a JSON object, not {_kind(value)}")
    _check_characters(value)
    kind = next((key for key in ("messages", "conversations", "instruction") if key in value), None)
    if kind is not None:
        messages = _alpaca(value) if kind == "instruction" else _messages(value, kind)
        if value.get("system"):
            messages.insert(0, {"role": "system", "content": value["system"]})
        tools = None if kind == "instruction" else _tools(value.get("tools"))
        return Row(_checked(messages), tools=tools, source=source, meta=value)
    if "prompt" in value:
        return _completion(value, source)
    if "text" in value:
        text = _string(value["text"], "text")
        if not text.strip():
            raise InputError("the text is empty")
        return Row(text=text, source=source, meta=value)
    raise InputError(
        f"its keys are {', '.join(map(repr, value)) or 'none'}; a row has messages, conversations,"
        " instruction and output, prompt and completion, or text"
    )


def _alpaca(value: dict[str, Any]) -> list[Message]:
    instruction, given = _string(value["instruction"], "instruction"), _string(value.get("input") or "", "input")
    messages: list[Message] = []
    for turn in value.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2):
            raise InputError("history is a list of [instruction, output] pairs")
        messages += _turn(*turn)
    question = f"{instruction}\n\n{given}" if given else instruction
    return messages + _turn(question, _string(value.get("output"), "output"))


def _completion(value: dict[str, Any], source: str) -> Row:
    prompt, completion = value["prompt"], value.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        context, rest = _messages(value, "prompt"), _messages(value, "completion")
        if not rest:
            raise InputError("the completion is empty")
        tools = _tools(value.get("tools"))
        return Row(_checked([*context, *rest]), tools=tools, context=len(context), source=source, meta=value)
    messages = _turn(_string(prompt, "prompt"), _string(completion, "completion"))
    return Row(_checked(messages), pair=True, source=source, meta=value)


def _turn(question: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _messages(value: dict[str, Any], key: str) -> list[Message]:
    if not isinstance(value[key], list):
        raise InputError(f"{key} is a list, not {_kind(value[key])}")
    messages = []
    for number, entry in enumerate(value[key], start=1):
        if not isinstance(entry, dict):
            raise InputError(f"message {number} is a JSON object, not {_kind(entry)}")
        if "from" in entry and "role" not in entry:  # ShareGPT
            entry = {"role": entry["from"], "content": entry.get("value")}
        messages.append(dict(entry))
    return messages


def _checked(messages: list[Message]) -> list[Message]:
    """The messages with their roles in our words, if a chat template can make sense of them."""
    before = None
    for number, message in enumerate(messages, start=1):
        name = message.get("role")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise InputError(f"message {number} has the role {name!r}; known are {', '.join(ROLES)}")
        if before not in FOLLOWS[role]:
            place = f"after the {before}'s" if before else "first"
            raise InputError(f"message {number} is the {role}'s, which cannot come {place}")
        if "weight" in message:
            raise InputError(f"message {number} has a weight: every answer is learned; leave out what should not be")
        message["role"] = before = role
        if message.get("content") is None and message.get("tool_calls"):
            continue
        content = _string(message.get("content"), f"the content of message {number}")
        if role == "assistant" and not content.strip() and not message.get("tool_calls"):
            raise InputError(f"message {number}, an answer, is empty")
    if before != "assistant":
        raise InputError(f"there is no answer: the last message is the {before}'s" if before else "no messages")
    return messages


def _string(value: Any, what: str) -> str:
    if value is None:
        raise InputError(f"{what} is missing")
    if not isinstance(value, str):
        raise InputError(f"{what} is a string, not {_kind(value)}")
    return value


def _check_characters(value: dict[str, Any]) -> None:
    """JSON can write half of a surrogate pair, which is no character and has no tokens."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{error.object[error.start]!a} is half a character, not text") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"not made of JSON values: {error}") from error


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Tools are a list of JSON schemas; some data sets hold that list as a string of JSON."""
    tools = parse_json(value) if isinstance(value, str) and value else value or None
    if isinstance(tools, InputError):
        raise InputError(f"tools: {tools}")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError("tools is a list of JSON objects")
    return tools


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "a string", bool: "true or false", int: "a number"}
    return "null" if value is None else kinds.get(type(value), "a number")
