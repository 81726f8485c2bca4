"""The conversations of docs/masks.md. A word of six letters or more stands in one message: it tells who wrote it."""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

from helpers.chat import assistant, system, user

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Forecasts <precipitation> & clouds",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
END = "END"  # stands for the token that ends a turn in the template at hand


def call(city: str, number: int = 1) -> dict[str, Any]:
    return {
        "type": "function",
        "id": f"call0000{number}",
        "function": {"name": "weather", "arguments": {"city": city}},
    }


def calls(*tool_calls: dict[str, Any], **message: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(tool_calls)} | message


def result(content: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "tool_call_id": f"call0000{number}", "content": content}


WHERE, THERE = user("Where is Trondheim?"), assistant("Northern Norway.")
LARGER, SMALLER = user("Larger than Bergen?"), assistant("Slightly smaller.")
UMBRELLA, PACK = user("Should umbrellas travel?"), assistant("Certainly pack one.")
DRIZZLE, SUNSHINE = result("drizzle afternoon"), result("sunshine tomorrow", 2)
COMPARE = {"reasoning_content": "Compare populations firstly."}
REMEMBER = {"reasoning_content": "Remember geography lessons."}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [WHERE, THERE],
    "turns": [WHERE, THERE, LARGER, SMALLER, user("Thanks anyway"), assistant("Pleasure!")],
    "system": [system("Please sound librarianlike."), WHERE, THERE],
    "thoughts": [WHERE, THERE, LARGER, SMALLER | COMPARE],
    "earlier thoughts": [WHERE, THERE | REMEMBER, LARGER, SMALLER | COMPARE],
    "call": [UMBRELLA, calls(call("Lillehammer")), DRIZZLE, PACK],
    "last call": [UMBRELLA, calls(call("Lillehammer"))],
    "two calls": [UMBRELLA, calls(call("Lillehammer"), call("Kristiansand", 2)), DRIZZLE, SUNSHINE, PACK],
    "call after call": [
        *(UMBRELLA, calls(call("Lillehammer")), DRIZZLE),
        *(calls(call("Kristiansand", 2)), SUNSHINE, PACK),
    ],
    "call and text": [UMBRELLA, calls(call("Lillehammer"), content="Consulting satellites."), DRIZZLE, PACK],
    "null content": [UMBRELLA, calls(call("Lillehammer"), content=None), DRIZZLE, PACK],
    "thoughts and call": [
        *(UMBRELLA, calls(call("Lillehammer"), reasoning_content="Meteorologists needed."), DRIZZLE),
        PACK | {"reasoning_content": "Dampness matters."},
    ],
    "no tools": [UMBRELLA, calls(call("Lillehammer"), content="Consulting satellites."), DRIZZLE, PACK],
    "string arguments": [UMBRELLA, calls(call("Lillehammer")), DRIZZLE, PACK],
    "empty keys": [system("Please sound librarianlike."), WHERE, THERE],
    "answer first": [assistant("Welcome, traveller!"), WHERE, THERE],
    "two answers": [WHERE, THERE, assistant("Beautiful fjords."), LARGER, SMALLER],
    "question last": [WHERE, THERE, LARGER],
    "quotes": [user(f"Which marker {END}?"), assistant(f"Usually {END} itself."), LARGER, assistant(f"{END} {END}")],
    "emoji": [user("Grüße 👩‍👧, 東京"), assistant("Schön 🤗, 中文 👩‍🚀")],
    "white space": [user("  Where is Trondheim?\n\n"), assistant("\n Northern Norway. \n"), LARGER, SMALLER],
}
DESCRIPTIONS = {
    "one turn": "a question and an answer",
    "turns": "three of each",
    "system": "a system message before them",
    "thoughts": "two of each; the last answer has `reasoning_content`",
    "earlier thoughts": "both answers have",
    "call": "a tool call, its result, an answer",
    "last call": "ends with the call",
    "two calls": "two calls in one message, two results, an answer",
    "call after call": "call, result, call, result, answer",
    "call and text": "as `call`; the message that calls says something, too",
    "null content": 'as `call`; `"content": null` beside the call',
    "thoughts and call": "as `call`; the call and the answer have `reasoning_content`",
    "no tools": "as `call and text`; the row lists no `tools`",
    "string arguments": "as `call`; the arguments are JSON in a string, as OpenAI has them",
    "empty keys": "as `system`; every message has the keys that some have, empty or null",
    "answer first": "begins with the assistant",
    "two answers": "the assistant speaks twice in a row",
    "question last": "ends with the user",
    "quotes": "question and answers quote the token that ends a turn; the last one ends with it",
    "emoji": "letters of several bytes, of several tokens; the answer ends with one",
    "white space": "contents begin and end with spaces and line ends",
}
assert CONVERSATIONS.keys() == DESCRIPTIONS.keys()


def row_of(conversation: str, end: str, in_parts: bool = False) -> dict[str, Any]:
    """A row of `messages` and perhaps `tools`; where `in_parts`, content is a list of parts."""
    messages = copy.deepcopy(CONVERSATIONS[conversation])
    for message in messages:
        if isinstance(message["content"], str):
            text = message["content"].replace(END, end)
            message["content"] = [{"type": "text", "text": text}] if in_parts else text
    has_calls = any("tool_calls" in message for message in messages)
    return {"messages": messages} | ({"tools": TOOLS} if has_calls and conversation != "no tools" else {})


def as_given(conversation: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row in the form in which minilora is given it: it may say the same in another way."""
    row = copy.deepcopy(row)
    for message in row["messages"]:
        if conversation == "empty keys":
            message |= {"tool_calls": [], "reasoning_content": None, "tool_call_id": None, "name": None}
        if conversation == "string arguments":
            for each in message.get("tool_calls", []):
                each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
    return row


def texts(value: Any) -> Iterator[str]:
    """All strings in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)


def words_of(value: Any) -> set[str]:
    return {word for text in texts(value) for word in re.findall(r"[^\W\d_]{6,}", text)}


def written(row: dict[str, Any]) -> Iterator[tuple[int, str, set[str]]]:
    """For each message, by its index, its parts by name and the words that tell each of them."""
    for i, message in enumerate(row["messages"]):
        yield i, "text", words_of(message["content"])
        yield i, "thoughts", words_of(message.get("reasoning_content"))
        for each in message.get("tool_calls", []):
            yield i, "call", words_of(each["function"]["arguments"])
    if "tools" in row:
        yield -1, "tools", words_of([tool["function"]["description"] for tool in row["tools"]])
