"""A chat template: the Jinja2 program with which a model's authors turn a conversation into one string.

It comes from a stranger's file, so it runs in Jinja2's immutable sandbox, sees plain JSON values only, and gets
just the helpers that templates rely on: those of transformers' `apply_chat_template`.
"""

import json
from typing import Any

from minilora.errors import InputError
from minilora.text.template_form import TemplateForm, call_form, content_form

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

    given_variables = json.dumps(_plain(variables), sort_keys=True)
    if any(message.get("tool_calls") for message in messages):
        form = call_form(source, given_variables)
    else:
        form = TemplateForm(content_form(source, given_variables))
    given = {"messages": [_completed(message, form, source) for message in messages], "tools": tools}
    values = _plain({"documents": None, **variables, **given, "add_generation_prompt": add_generation_prompt})
    return sandbox.render(source, values)


def joined_parts(parts: list[Any], what: str) -> str:
    """Content in parts, [{"type": "text", "text": "..."}, ...], as one text: joined by line ends.

    So do llama.cpp's server and vLLM, where a chat template wants a string. Raises InputError, naming `what` they are
    the content of, for a part that is no text.
    """
    texts = []
    for part in parts:
        given = part if isinstance(part, dict) else {"text": part}
        text, kind = given.get("text", given.get("value")), given.get("type", "text")
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise InputError(f"{what}: the content has a part that is no text ({kind}): only text is read")
        texts.append(text)
    return "\n".join(texts)


def _completed(message: Message, form: TemplateForm, source: str) -> Message:
    """The message as this template reads it.

    Null is a missing key; an answer's thoughts go by all their names, since under another name than the template reads
    they would silently not be there; `weight`, which says whether it is learned, is not the template's; a developer's
    words are the system's for a template that knows no developer.
    """
    present = {key: value for key, value in message.items() if value is not None and key != "weight"}
    thoughts = next((present[name] for name in THOUGHTS if name in present), None)
    if thoughts is not None:
        present = {**dict.fromkeys(THOUGHTS[:2], thoughts), **present}
    if present.get("role") == "developer" and "developer" not in source:
        present["role"] = "system"
    if isinstance(present.get("content"), list):
        present["content"] = joined_parts(present["content"], f"the {present.get('role')}'s message")
    if not present.get("tool_calls"):
        present.pop("tool_calls", None)  # no calls are no key
    return form.applied(present)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A copy made of dict, list, str, int, float, bool and None: nothing that a template could call or change."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        raise InputError(f"messages, tools and template variables must be JSON values: {error}") from error
    return copy
