"""The messages of a conversation in one form, whoever wrote them: OpenAI's, as chat templates read it.

    {"from": "human", "value": "Hi"}                      ->  {"role": "user", "content": "Hi"}
    {"from": "function_call", "value": '{"name": ...}'}   ->  {"role": "assistant", "tool_calls": [{...}]}
    {"role": "assistant", "content": "a", "train": false} ->  {"role": "assistant", "content": "a", "weight": 0}

A tool call's arguments become an object, content in parts becomes a string. An answer that is not to be learned has
`weight: 0`, whichever name its mark had. What a message holds besides goes to the chat template as it is.
"""

from typing import Any

from minilora.data.json_values import parse_json
from minilora.errors import InputError
from minilora.text import Message, joined_parts

ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
    **{"function_call": "assistant", "observation": "tool", "function": "tool", "ipython": "tool"},
}
# Marks on a turn that say whether it is learned: OpenAI's and Mistral's weight, Axolotl's train and training,
# ms-swift's loss, LLaMA-Factory's loss_weight; and torchtune's masked, which says the opposite.
LEARNED_IF_TRUE = ("weight", "train", "training", "trainable", "loss", "loss_weight")
LEARNED_IF_FALSE = ("masked", "mask")
YES, NO = (True, "true", "True", "1"), (False, "false", "False", "0")  # 1 == True, 0 == False, 1.0 and 0.0 too
REFUSED = {
    "refusal": "a refusal is not learned: write it into content",
    "audio": "audio is not read",
    "images": "images are not read",
    "image": "images are not read",
    "videos": "videos are not read",
    "audios": "audio is not read",
    "train_detail": "parts of an answer cannot be marked, only whole answers",
    "training_detail": "parts of an answer cannot be marked, only whole answers",
}


def as_messages(entries: list[Any]) -> list[Message]:
    """The messages in OpenAI's form.

    Raises InputError naming the message that is malformed, or says something that would be lost.
    """
    messages = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise InputError(f"message {number} is a JSON object, not {kind_of(entry)}")
        try:
            messages.append(_as_message(entry))
        except InputError as error:
            raise InputError(f"message {number}{error}") from error
    return messages


def _as_message(entry: dict[str, Any]) -> Message:
    """One message; errors go on from "message 3"."""
    message = {key: value for key, value in entry.items() if value is not None}
    for sharegpt, ours in (("from", "role"), ("value", "content")):
        if sharegpt in message and message.setdefault(ours, message[sharegpt]) != message.pop(sharegpt):
            raise InputError(f" has both {sharegpt!r} and {ours!r}, and they differ")
    name = message.get("role")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise InputError(f" has the role {name!r}; known are {', '.join(ROLES)}")
    message["role"] = role
    for key, reason in REFUSED.items():
        if message.get(key):
            raise InputError(f" has {key!r}: {reason}")
        message.pop(key, None)
    learned = _mark(message, role)
    if name == "function_call":
        message["tool_calls"] = _json(message.pop("content", None), "content")
    if "function_call" in message:  # OpenAI's form before tool calls
        message["tool_calls"] = [message.pop("function_call"), *(message.get("tool_calls") or [])]
    calls = _tool_calls(message.pop("tool_calls", None))
    content = message.get("content")
    if isinstance(content, list):
        content = message["content"] = joined_parts(content, "")
    if calls:
        if role != "assistant":
            raise InputError(f", the {role}'s, has tool_calls: only the assistant calls tools")
        message["tool_calls"] = calls
    elif content is None:
        raise InputError(": the content is missing")
    if content is not None and not isinstance(content, str):
        raise InputError(f": the content is a string, not {kind_of(content)}")
    if role == "assistant" and not calls and not (content or "").strip():
        raise InputError(", an answer, is empty")
    if not learned:
        message["weight"] = 0
    return message


def _mark(message: Message, role: str) -> bool:
    """Whether the message is to be learned, as far as its marks say; they are taken out of it."""
    marks = {name: message.pop(name) for name in (*LEARNED_IF_TRUE, *LEARNED_IF_FALSE) if name in message}
    said = {}
    for name, value in marks.items():
        if not isinstance(value, bool | int | float | str) or value not in (*YES, *NO):
            raise InputError(f" has {name}: {value!r}; an answer is learned (1, true) or not (0, false)")
        said[name] = (value in YES) == (name in LEARNED_IF_TRUE)
    if role == "assistant":
        if len(set(said.values())) > 1:
            raise InputError(f" has marks that disagree: {marks}")
        return all(said.values())
    for name, learned in said.items():  # a weight of 1 is what every message has
        if learned and name in LEARNED_IF_TRUE and not name.endswith("weight"):
            raise InputError(f", the {role}'s, is marked {name}: {marks[name]!r}: only the assistant's are learned")
    return True


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as chat templates read them: each {"type": "function", "function": {"name", "arguments": {...}}}."""
    calls = _json(value, "tool_calls") if isinstance(value, str) else value
    if isinstance(calls, dict):
        calls = [calls]
    if calls is None or calls == []:
        return []
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise InputError(": tool_calls is a list of JSON objects")
    return [_tool_call(call) for call in calls]


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    call = {key: value for key, value in call.items() if value is not None}
    if not isinstance(call.get("function"), dict):  # the bare function, as in ShareGPT's function_call
        own = {key: value for key, value in call.items() if key in ("name", "arguments", "parameters")}
        rest = {key: value for key, value in call.items() if key not in own}
        call = {"type": "function", **rest, "function": own}
    function = {key: value for key, value in call["function"].items() if value is not None}
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(": a tool call has no name")
    arguments = function.pop("arguments", function.pop("parameters", {}))
    if isinstance(arguments, str):  # OpenAI's form: an object as a string of JSON
        arguments = _json(arguments, f"the arguments of {function['name']}") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise InputError(f": the arguments of {function['name']} are a JSON object, not {kind_of(arguments)}")
    return {**call, "function": {**function, "arguments": arguments}}


def _json(text: Any, what: str) -> Any:
    value = parse_json(text) if isinstance(text, str) else text
    if isinstance(value, InputError):
        raise InputError(f": {what}: {value}")
    return value


def as_tools(tools: Any, functions: Any = None) -> list[dict[str, Any]] | None:
    """The JSON schemas of functions from a row's `tools`, or from OpenAI's older `functions`; None if there are none.

    Some data sets hold the list as a string of JSON. Raises InputError where it is anything else.
    """
    if functions:
        if tools:
            raise InputError("it has both tools and functions: leave one of them out")
        functions = _listed(functions, "functions")
        return [each if "function" in each else {"type": "function", "function": each} for each in functions]
    return _listed(tools, "tools") if tools else None


def _listed(value: Any, what: str) -> list[dict[str, Any]]:
    listed = parse_json(value) if isinstance(value, str) else value
    if isinstance(listed, InputError):
        raise InputError(f"{what}: {listed}")
    if not (isinstance(listed, list) and all(isinstance(each, dict) for each in listed)):
        raise InputError(f"{what} is a list of JSON objects")
    return listed


def kind_of(value: Any) -> str:
    """What a JSON value is, in words for an error."""
    kinds = {list: "a list", dict: "an object", str: "a string", bool: "true or false", int: "a number"}
    return "null" if value is None else kinds.get(type(value), "a number")
