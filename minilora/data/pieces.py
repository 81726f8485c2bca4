"""Where in a rendered conversation each piece of its text stands, and what the chat template leaves out.

The conversation is rendered twice, the second time with a mark in the place of every piece:

    <|im_start|>user\\nHi there<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    <|im_start|>user\\n{0}<|im_end|>\\n<|im_start|>assistant\\n{1}<|im_end|>\\n

What stands between the marks is the template's own and the same in both, so the place of each piece follows exactly,
and a piece whose mark is not there was left out. A template may branch on anything but the words themselves: white
space around them and <think> tags are kept.
"""

import json
import re
import secrets
from itertools import pairwise
from typing import Any, NamedTuple

from minilora.errors import InputError
from minilora.text import Message

NONCE = f"mark{secrets.token_hex(8)}n"  # drawn anew in each process, so that no message can contain it
MARK = re.compile(NONCE + r"(\d+)z")
THINK_TAG = re.compile(r"(</?think(?:ing)?>)")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
KEPT = ("role", "tool_call_id", "weight")  # what a template compares with, or does not get

UNCERTAIN = (
    "the chat template writes the conversation in a way that its answers cannot be told apart;"
    " split the conversation, or mark the answers in the template with {% generation %}"
)


class Piece(NamedTuple):
    """A piece of a message's text: `part` is content, thoughts, call, or another key of the message."""

    message: int
    part: str
    text: str


class Place(NamedTuple):
    """Where a piece stands in the rendered text."""

    piece: int
    start: int
    end: int


def marked(messages: list[Message]) -> tuple[list[Message], list[Piece]]:
    """The messages with a mark in the place of each piece of text, and the pieces in the marks' order."""
    pieces: list[Piece] = []
    return [_marked_message(message, i, pieces) for i, message in enumerate(messages)], pieces


def _marked_message(message: Message, i: int, pieces: list[Piece]) -> Message:
    def mark(text: str, part: str) -> str:
        words = text.strip()
        if not words:
            return text
        pieces.append(Piece(i, part, words))
        before, after = text.split(words, 1)
        return f"{before}{NONCE}{len(pieces) - 1}z{after}"

    def mark_all(value: Any, part: str) -> Any:
        if isinstance(value, dict):
            return {key: mark_all(each, part) for key, each in value.items()}
        if isinstance(value, list):
            return [mark_all(each, part) for each in value]
        return mark(value, part) if isinstance(value, str) else value

    copy = dict(message)
    for key, value in message.items():
        if key == "content" and message["role"] == "assistant" and isinstance(value, str):
            parts = [*THINK_TAG.split(value), ""]
            copy[key] = "".join(  # what stands before a closing tag are thoughts
                part if THINK_TAG.fullmatch(part) else mark(part, "thoughts" if tag.startswith("</") else "content")
                for part, tag in pairwise(parts)
            )
        elif key == "tool_calls":
            copy[key] = [_with_function(call, mark_all(_words(call), "call")) for call in value]
        elif key not in KEPT:
            copy[key] = mark_all(value, "thoughts" if key in THOUGHTS else key)
    return copy


def _words(call: dict[str, Any]) -> dict[str, Any]:
    """What of a call is text: the function's name and arguments. Its id is compared with that of its result."""
    return {key: value for key, value in call["function"].items() if key in ("name", "arguments")}


def _with_function(call: dict[str, Any], function: dict[str, Any]) -> dict[str, Any]:
    return {**call, "function": {**call["function"], **function}}


def places(text: str, marked_text: str, pieces: list[Piece]) -> list[Place]:
    """Where the pieces stand in `text`, in its order; one may stand there several times, or not at all.

    Raises InputError where the two do not agree: the template branches on the words.
    """
    between = MARK.split(marked_text)  # [the template's, number, the template's, number, ..., the template's]
    found: list[Place] = []
    if not text.startswith(between[0]):
        raise InputError(UNCERTAIN)
    position = len(between[0])
    for number, following in zip(map(int, between[1::2]), between[2::2], strict=True):
        last = len(found) == len(between) // 2 - 1
        end = _end_of(pieces[number].text, text, position, following, last)
        found.append(Place(number, position, end))
        position = end + len(following)
    return found


def _end_of(piece: str, text: str, start: int, following: str, last: bool) -> int:
    """Where the piece that begins at `start` ends: the template's own text follows there, or the end."""
    for written in dict.fromkeys((piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1])):
        end = start + len(written)
        if text.startswith(written + following, start) and (not last or end + len(following) == len(text)):
            return end
    # Some templates write a result anew, {"celsius": 21} as {celsius:21}: then its words are there in their order.
    end = text.rfind(following, start) if last else text.find(following, start) if following else -1
    if end < start or (last and end + len(following) != len(text)) or not _has_words(text[start:end], piece):
        raise InputError(UNCERTAIN)
    return end


def _has_words(text: str, piece: str) -> bool:
    position = 0
    for word in re.findall(r"\w+", piece):
        position = text.find(word, position)
        if position < 0:
            return False
        position += len(word)
    return True
