"""Rows of training data: conversations or texts, read from JSON and JSON Lines and recognised by their keys."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.chat_template import Message
from minilora.errors import InputError

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One row: a conversation, or a plain text.

    Attributes:
        messages: dicts with `role`, `content` and whatever else the chat template reads; None for a plain text.
        text: a plain text to be learned whole; None for a conversation.
        tools: JSON schemas of the functions that the conversation may call.
        context: how many leading messages are never learned, even where they are the assistant's.
        untemplated: this row came as two strings, prompt and completion, and may be read without a chat template.
        source: where it comes from, as "file.jsonl:12".
        meta: the original row.
    """

    messages: list[Message] | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None
    context: int = 0
    untemplated: bool = False
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


def load_rows(path: str | Path) -> list[Row]:
    """Read a .json (an array) or .jsonl file of Alpaca, ShareGPT, chat, prompt/completion or plain-text rows.

    Raises:
        InputError: the file cannot be read, or some rows are malformed: their number, and the first few with file,
            line and what is wrong.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    rows: list[Row] = []
    bad: list[str] = []
    for line, value in _values(path, content):
        source = f"{path.name}:{line}"
        try:
            if isinstance(value, InputError):
                raise value
            rows.append(as_row(value, source))
        except InputError as error:
            bad.append(f"{source}: {error}")
    _refuse(bad, len(rows) + len(bad), str(path))
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def as_rows(values: list[dict[str, Any]]) -> list[Row]:
    """The same from dicts in memory; a row's source is "row 1", "row 2", ...

    Raises:
        InputError: some rows are malformed.
    """
    rows: list[Row] = []
    bad: list[str] = []
    for number, value in enumerate(values, start=1):
        try:
            rows.append(as_row(value, f"row {number}"))
        except InputError as error:
            bad.append(f"row {number}: {error}")
    _refuse(bad, len(values), "rows")
    return rows


def _refuse(bad: list[str], total: int, what: str, shown: int = 5) -> None:
    if bad:
        more = f"; and {len(bad) - shown} more" if len(bad) > shown else ""
        raise InputError(f"{what}: {len(bad)} of {total} rows are malformed: {'; '.join(bad[:shown])}{more}")


def _values(path: Path, content: str) -> list[tuple[int, Any]]:
    """(line, value) of each row; the value is an InputError where the line is not JSON."""
    if content.lstrip().startswith("["):
        return _array_values(path, content)
    values: list[tuple[int, Any]] = []
    for line, text in enumerate(content.split("\n"), start=1):
        if text.strip():
            try:
                values.append((line, json.loads(text)))
            except ValueError as error:
                values.append((line, InputError(f"not valid JSON ({error})")))
    return values


def _array_values(path: Path, content: str) -> list[tuple[int, Any]]:
    try:
        array = json.loads(content)
    except ValueError as error:
        raise InputError(f"{path}: not a valid JSON array ({error})") from error
    return list(enumerate(array, start=1))


def as_row(value: Any, source: str = "") -> Row:
    """Recognise one row by its keys.

    Raises:
        InputError: no known keys, or a malformed row.
    """
    if not isinstance(value, dict):
        raise InputError(f"a row must be a JSON object, not {type(value).__name__}")
    if "messages" in value or "conversations" in value:
        messages = [_message(m) for m in value.get("messages") or value.get("conversations") or []]
        return Row(_checked(messages), tools=value.get("tools"), source=source, meta=value)
    if "instruction" in value and "output" in value:
        prompt = value["instruction"] + ("\n\n" + value["input"] if value.get("input") else "")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": value["output"]}]
        if value.get("system"):
            messages.insert(0, {"role": "system", "content": value["system"]})
        return Row(_checked(messages), source=source, meta=value)
    if "prompt" in value and "completion" in value:
        prompt, completion = value["prompt"], value["completion"]
        if isinstance(prompt, list):
            return Row(_checked([*prompt, *completion]), context=len(prompt), source=source, meta=value)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return Row(_checked(messages), untemplated=True, source=source, meta=value)
    if "text" in value:
        return Row(text=value["text"], source=source, meta=value)
    raise InputError(f"unknown keys {sorted(value)}")


def _message(value: Any) -> Message:
    if isinstance(value, dict) and "from" in value:
        return {"role": SHAREGPT_ROLES.get(value["from"], value["from"]), "content": value.get("value")}
    return value


def _checked(messages: list[Message]) -> list[Message]:
    if not messages or messages[-1].get("role") != "assistant":
        raise InputError("the last message must be the assistant's answer")
    return messages
