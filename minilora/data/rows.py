"""Rows of training data, recognised by their keys.

    messages or conversations        a conversation, in `role`/`content` or in ShareGPT's `from`/`value`
    instruction, output              Alpaca: also `input`, which follows the instruction, and `history`, a list of
                                     earlier [instruction, output] pairs
    prompt, completion               two strings, or two lists of messages
    text                             a plain text, learned whole

Whichever of these comes first in this list decides; `system`, `tools` and `chat_template_kwargs` may stand beside all
but the last. Nothing in a row is dropped silently: a key is used, or named in `Row.unused`, or the row is refused, with
its file and line: a row that disappears, or is learned as something else, is found out too late.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from minilora.data.files import find_files, read_files
from minilora.data.messages import as_messages, as_tools, kind_of
from minilora.data.tables import table_rows
from minilora.errors import InputError
from minilora.progress import with_progress
from minilora.text import Message

T = TypeVar("T")
R = TypeVar("R")

SYSTEM = ("system", "system_prompt", "system_message")
PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag")
REFUSED = {  # keys that mean something for training which would be lost
    **dict.fromkeys(("images", "image", "videos", "audios", "audio"), "only text is read"),
    **dict.fromkeys(("weight", "loss_weight", "sample_weight"), "all rows weigh the same; repeat or leave out rows"),
    "loss_mask": "for a mask of your own, train on Examples: input_ids with labels",
}
SHOWN = 5  # malformed rows quoted in an error


@dataclass(frozen=True)
class Row:
    """One row: a conversation with an answer, or a plain text.

    Attributes:
        messages: dicts with `role`, `content`, `tool_calls` and whatever else the chat template reads, in OpenAI's
            form; `weight: 0` marks an answer that is only read. None for a plain text.
        text: the plain text, learned whole; None for a conversation.
        tools: JSON schemas of the functions that the conversation may call.
        context: the number of leading messages that are only read, even where they are the assistant's.
        pair: the conversation was two strings, prompt and completion: without a chat template they are joined.
        chat_template_kwargs: variables of the chat template, such as `enable_thinking`, for this row.
        unused: keys of the row that training does not use.
        source: where the row comes from, such as "file.jsonl:12".
        meta: the row as it was.
    """

    messages: list[Message] | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None
    context: int = 0
    pair: bool = False
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


# names of files and patterns of them; Rows or dicts, of any iterable; a DataFrame, a datasets.Dataset, a pyarrow.Table
Rows = str | Path | Iterable[str | Path] | Iterable[Row] | Iterable[dict[str, Any]] | Iterable[Any]


@dataclass(frozen=True)
class Skipped:
    """A row that is not trained on, and why."""

    source: str
    reason: str


def load_rows(files: str | Path | Iterable[str | Path], skipped: list[Skipped] | None = None) -> list[Row]:
    """Read the rows of files: .json, .jsonl, .csv, .tsv or .parquet, the first four also as .gz or .zst.

    A row is recognised by its keys: `messages` or `conversations` (OpenAI's or ShareGPT's form of a conversation);
    `instruction` and `output` (Alpaca); `prompt` and `completion`; or `text`.

    Args:
        files: a file's name, a pattern such as "data/*.jsonl", or several of them; texts are in UTF-8.
        skipped: a list that rows which cannot be used are put into; None makes them an error.

    Returns:
        The rows in the files' order, those of a pattern sorted by name.

    Raises:
        InputError: a file cannot be read or holds no rows, or rows are malformed: how many, and for the first few
            the file, the line and what is wrong.
    """
    if isinstance(files, Mapping):
        raise InputError("load_rows takes names of files; with weights, they go through mix_rows")
    return collect(read_files(find_files([files] if isinstance(files, str | Path) else files)), skipped)


def as_rows(values: Iterable[Any], skipped: list[Skipped] | None = None) -> list[Row]:
    """The same from dicts in memory; their sources are "row 1", "row 2", ... InputError as `load_rows`."""
    return collect(((f"row {number}", value) for number, value in enumerate(values, start=1)), skipped)


def given_rows(rows: Rows, what: str, skipped: list[Skipped] | None = None) -> list[Row]:
    """The rows of whatever a caller gave; `what` they are, such as "training", is named in errors.

    Raises InputError where there are none, they are not all of a kind, or as `load_rows` does.
    """
    if isinstance(rows, str | Path):
        return load_rows(rows, skipped)
    # A DataFrame iterates over the names of its columns, which would be taken for files: tables come first.
    table = table_rows(rows)
    given: list[Any] = list(table if table is not None else rows if isinstance(rows, Iterable) else [rows])
    kinds = {type(row) for row in given}
    if not given:
        raise InputError(f"there are no {what} rows")
    if table is not None or kinds == {dict}:
        return as_rows(given, skipped)
    if isinstance(rows, Mapping):
        raise InputError(f"{what} rows are a list of dicts, not one dict; files with weights go through mix_rows")
    if kinds == {Row}:
        return given
    if all(isinstance(row, str | Path) for row in given):
        return load_rows(given, skipped)
    names = " and ".join(sorted(kind.__name__ for kind in kinds))
    raise InputError(f"{what} rows must be a path, or all dicts or all Rows, not {names}")


def collect(values: Iterable[tuple[str, Any]], skipped: list[Skipped] | None = None) -> list[Row]:
    """Recognise (source, value) pairs; a value may be an InputError, met while reading it."""
    pairs = with_progress(values, None, "Reading", "rows")
    return each(pairs, lambda pair: pair[0], lambda pair: as_row(pair[1], pair[0]), skipped)


def each(
    items: Iterable[T], source: Callable[[T], str], function: Callable[[T], R], skipped: list[Skipped] | None = None
) -> list[R]:
    """Apply a function to all items; those it refuses go into `skipped`, or into one InputError that quotes a few.

    An error too where it refuses all.
    """
    results: list[R] = []
    bad: list[Skipped] = []
    for item in items:
        try:
            results.append(function(item))
        except InputError as error:
            bad.append(Skipped(source(item), str(error)))
    if skipped is not None and results:
        skipped += bad
    elif bad:
        way_out = "" if skipped is not None else "; skip_bad_rows leaves them out"
        total = len(bad) + len(results)
        raise InputError(f"{len(bad)} of {total} rows cannot be used: {quoted(bad, SHOWN)}{way_out}")
    return results


def quoted(skipped: Sequence[Skipped], shown: int) -> str:
    """The first reasons in words, and how many more there are."""
    more = f"; and {len(skipped) - shown} more" if len(skipped) > shown else ""
    return "; ".join(f"{row.source or 'a row'}: {row.reason}" for row in skipped[:shown]) + more


# From a JSON value to a row


def as_row(value: Any, source: str = "") -> Row:
    """Recognise one row by its keys; raise InputError where it has none of them, is malformed, or is an InputError."""
    if isinstance(value, InputError):
        raise value
    if not isinstance(value, dict):
        raise InputError(f"a row is a JSON object, not {kind_of(value)}")
    _check_characters(value)
    _refuse_what_would_be_lost(value)
    kind = next((key for key in ("messages", "conversations", "instruction", "prompt", "text") if key in value), None)
    if kind is None:
        raise InputError(
            f"its keys are {', '.join(map(repr, value)) or 'none'}; a row has messages, conversations,"
            " instruction and output, prompt and completion, or text"
        )
    if kind == "text":
        text = _string(value["text"], "text")
        if beside := [key for key in (*SYSTEM, "tools", "functions") if value.get(key)]:
            raise InputError(
                f"it has {beside[0]!r} beside a plain text, which is learned as it is: write it into the text"
            )
        if not text.strip():
            raise InputError("the text is empty")
        return Row(text=text, unused=_unused(value, {"text"}), source=source, meta=value)
    given, context, used = FORMATS[kind](value, kind)
    system = _system(value)
    messages = as_messages(given)
    if system is not None and messages[:1] != [system]:
        if messages and messages[0]["role"] == "system":
            raise InputError("it has two system messages, which differ: one is its first message")
        messages.insert(0, system)
        context += bool(context)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise InputError("there is no answer: no message is the assistant's" if messages else "no messages")
    if all("weight" in message for message in answers):
        raise InputError("there is no answer to learn: all are marked as only to be read")
    variables = value.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise InputError(f"chat_template_kwargs is an object, not {kind_of(variables)}")
    return Row(
        messages,
        tools=as_tools(value.get("tools"), value.get("functions")),
        context=context,
        pair=isinstance(value.get(kind), str) and kind == "prompt",
        chat_template_kwargs=variables,
        unused=_unused(value, {*used, *SYSTEM, "tools", "functions", "chat_template_kwargs"}),
        source=source,
        meta=value,
    )


# Each format: its messages as they are written, how many of them are only read, and the keys that it uses.
Given = tuple[list[Any], int, tuple[str, ...]]


def _conversation(value: dict[str, Any], key: str) -> Given:
    return _list(value, key), 0, (key,)


def _alpaca(value: dict[str, Any], key: str) -> Given:
    instruction, given = _string(value["instruction"], "instruction"), _string(value.get("input") or "", "input")
    messages: list[Message] = []
    for turn in value.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2):
            raise InputError("history is a list of [instruction, output] pairs")
        messages += _turn(*turn)
    question = f"{instruction}\n\n{given}" if given else instruction
    messages += _turn(question, _string(value.get("output"), "output"))
    return messages, 0, ("instruction", "input", "output", "history")


def _completion(value: dict[str, Any], key: str) -> Given:
    prompt, completion = value["prompt"], value.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        if not completion:
            raise InputError("the completion is empty")
        return [*prompt, *completion], len(prompt), ("prompt", "completion")
    return _turn(_string(prompt, "prompt"), _string(completion, "completion")), 0, ("prompt", "completion")


FORMATS = {"messages": _conversation, "conversations": _conversation, "instruction": _alpaca, "prompt": _completion}


def _turn(question: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(value: dict[str, Any]) -> Message | None:
    """The system message that a row names beside its conversation."""
    texts = {_string(value[key], key) for key in SYSTEM if value.get(key)}
    if len(texts) > 1:
        raise InputError(
            f"it has several system messages ({', '.join(key for key in SYSTEM if value.get(key))}), which differ"
        )
    return {"role": "system", "content": texts.pop()} if texts else None


def _refuse_what_would_be_lost(value: dict[str, Any]) -> None:
    preference = [key for key in PREFERENCE if value.get(key) is not None]
    if isinstance(value.get("label"), bool):  # KTO's: whether the completion is wanted
        preference.append("label")
    if preference:
        raise InputError(
            f"a preference row ({', '.join(preference)}): it is for preference training (DPO, KTO), not for SFT"
        )
    for key, reason in REFUSED.items():
        if value.get(key) not in (None, 1, [], {}, ""):
            raise InputError(f"it has {key!r}: {reason}")


def _unused(value: dict[str, Any], used: set[str]) -> tuple[str, ...]:
    return tuple(str(key) for key in value if key not in used and value[key] not in (None, [], {}, ""))


def _list(value: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(value[key], list):
        raise InputError(f"{key} is a list, not {kind_of(value[key])}")
    return list(value[key])


def _string(value: Any, what: str) -> str:
    if value is None:
        raise InputError(f"{what} is missing")
    if not isinstance(value, str):
        raise InputError(f"{what} is a string, not {kind_of(value)}")
    return value


def _check_characters(value: dict[str, Any]) -> None:
    """JSON can write half of a surrogate pair, which is no character and has no tokens."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{error.object[error.start]!a} is half a character, not text") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"not made of JSON values: {error}") from error
