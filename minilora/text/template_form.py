"""In which form a chat template wants messages: it is asked, by a probing conversation.

Content is a string, or for most vision-language models a list of parts. A tool call's arguments are a string of JSON in
OpenAI's format, an object as transformers documents it; its content is null, missing or empty. A template takes some
of these; on others it fails, writes a quoted string or the word None, or leaves the words out.
"""

import json
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from minilora.errors import InputError


class TemplateForm(NamedTuple):
    """`content` is a string or parts; `arguments` an object or a string; `no_content` missing, null or empty."""

    content: str = "string"
    arguments: str = "object"
    no_content: str = "missing"

    def applied(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with its content as a string, if it has one, in this form."""
        message = dict(message)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [_call(call, self.arguments) for call in calls]
            if self.no_content != "missing":
                message.setdefault("content", None if self.no_content == "null" else "")
        if self.content == "parts" and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message


WORD = "pr0be"
CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "f", "arguments": {"flag": True, "x": WORD}}}
PROPERTIES = {"flag": {"type": "boolean", "description": "f"}, "x": {"type": "string", "description": "x"}}
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": PROPERTIES}}


@lru_cache(maxsize=64)
def content_form(source: str, variables: str) -> str:
    """Whether the template takes content as a string or in parts; `variables` are the template's, in JSON."""
    for form in ("string", "parts"):
        text = _written(source, variables, [TemplateForm(form).applied({"role": "user", "content": WORD})])
        if text is not None and WORD in text and "'text'" not in text:
            return form
    return "string"


@lru_cache(maxsize=64)
def call_form(source: str, variables: str) -> TemplateForm:
    """The first form in which the template writes a call as it should."""
    content = content_form(source, variables)
    forms = [TemplateForm(content, *each) for each in product(("object", "string"), ("missing", "null", "empty"))]
    for form in forms:
        text = _written_call(source, variables, form) or ""
        # as JSON; not as Python writes it, not quoted twice
        right = WORD in text and "true" in text and "True" not in text and '\\"flag' not in text
        if right and (form.no_content != "null" or "None" not in text):
            return form
    # In a syntax of its own, such as f(flag=True), or not at all.
    return next((form for form in forms if _written_call(source, variables, form) is not None), TemplateForm(content))


def _written_call(source: str, variables: str, form: TemplateForm) -> str | None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "r", "name": "f", "tool_call_id": "a1b2c3d4e"},
        {"role": "assistant", "content": "a"},
    ]
    return _written(source, variables, [form.applied(message) for message in messages], [TOOL])


def _written(
    source: str, variables: str, messages: list[dict[str, Any]], functions: list[dict[str, Any]] | None = None
) -> str | None:
    """What the template makes of the conversation; None where it refuses it."""
    from minilora.text import sandbox  # with it Jinja2, which `import minilora` alone does not need

    tools = functions and [{"type": "function", "function": each} for each in functions]
    values = {"documents": None, **json.loads(variables), "messages": messages, "tools": tools}
    try:
        return sandbox.render(source, {**values, "add_generation_prompt": False})[0]
    except InputError:
        return None


def _call(call: dict[str, Any], arguments: str) -> dict[str, Any]:
    """A call with its arguments as an object, or as a string of JSON."""
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    given = function.get("arguments")
    if arguments == "object" and isinstance(given, str):
        try:
            given = json.loads(given or "{}")
        except ValueError:
            return call  # no JSON: as it is
    elif arguments == "string" and isinstance(given, dict):
        given = json.dumps(given, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": given}}
