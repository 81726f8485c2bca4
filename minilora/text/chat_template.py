"""A chat template: the Jinja2 program with which a model's authors turn a conversation into one string.

It comes from a stranger's file, so it runs in Jinja2's immutable sandbox, sees plain JSON values only, and gets
just the helpers that templates rely on: those of transformers' `apply_chat_template`.
"""

import json
from typing import Any

from minilora.errors import InputError

Message = dict[str, Any]
Span = tuple[int, int]

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # templates read one of the first two


def render(
    source: str,
    messages: list[Message],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> tuple[str, list[Span]]:
    """Render a conversation with a template; return the text and its character spans in `{% generation %}`.

    Raises:
        InputError: the template does not parse, refuses the conversation (its own words are in the message) or
            fails on it; or a message, a tool or a variable is not made of JSON values.
    """
    from minilora.text import sandbox  # with it Jinja2, which `import minilora` alone does not need

    given = {"messages": [_completed(message) for message in messages], "tools": tools}
    values = _plain({"documents": None, **variables, **given, "add_generation_prompt": add_generation_prompt})
    return sandbox.render(source, values)


def _completed(message: Message) -> Message:
    """The message as templates expect it: null is a missing key, and an answer's thoughts go by all their names.

    An exported `"content": null` beside tool calls must not render as the word None; and thoughts under another name
    than the template reads would silently not be there.
    """
    present = {key: value for key, value in message.items() if value is not None}
    thoughts = next((present[name] for name in THOUGHTS if name in present), None)
    return present if thoughts is None else {**dict.fromkeys(THOUGHTS[:2], thoughts), **present}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A copy made of dict, list, str, int, float, bool and None: nothing that a template could call or change."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        raise InputError(f"messages, tools and template variables must be JSON values: {error}") from error
    return copy
