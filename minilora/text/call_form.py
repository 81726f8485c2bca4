"""How a chat template wants tool calls: it is asked, by a probing call.

OpenAI's format has the arguments as a string of JSON, transformers documents an object; a call's content is null,
missing or empty. A template takes some of these; on others it fails, or writes a quoted string, or the word None.
"""

import json
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from minilora.errors import InputError


class CallForm(NamedTuple):
    """How calls are given to a template: `arguments` as object or string, `no_content` as missing, null or empty."""

    arguments: str = "object"
    no_content: str = "missing"

    def applied(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message that has `tool_calls`, in this form."""
        message = message | {"tool_calls": [_call(call, self.arguments) for call in message["tool_calls"]]}
        if "content" in message or self.no_content == "missing":
            return message
        return message | {"content": None if self.no_content == "null" else ""}


PROBE = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "probe", "arguments": {"flag": True, "x": "y'z"}}}
PROPERTIES = {"flag": {"type": "boolean", "description": "f"}, "x": {"type": "string", "description": "x"}}
TOOL = {"name": "probe", "description": "d", "parameters": {"type": "object", "properties": PROPERTIES}}


@lru_cache(maxsize=64)
def call_form(source: str, variables: str) -> CallForm:
    """The first form in which the template writes a call as it should; `variables` are the template's, in JSON."""
    from minilora.text import sandbox

    values = {"documents": None, **json.loads(variables), "add_generation_prompt": False}
    values["tools"] = [{"type": "function", "function": TOOL}]
    for form in map(CallForm._make, product(("object", "string"), ("missing", "null", "empty"))):
        messages = [
            {"role": "user", "content": "q"},
            form.applied({"role": "assistant", "tool_calls": [PROBE]}),
            {"role": "tool", "content": "r", "name": "probe", "tool_call_id": "a1b2c3d4e"},
            {"role": "assistant", "content": "a"},
        ]
        try:
            text, _ = sandbox.render(source, {**values, "messages": messages})
        except InputError:
            continue
        # as JSON or in a syntax of the template's own; not as Python writes it, and not quoted twice
        right = "y'z" in text and "true" in text and "True" not in text and '\\"flag' not in text
        if right and not (form.no_content == "null" and "None" in text):
            return form
    return CallForm()


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
