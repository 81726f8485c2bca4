"""A chat template: the Jinja2 program with which a model's authors turn a conversation into one string.

It comes from a stranger's file, so it runs in Jinja2's immutable sandbox, sees plain JSON values only, and gets
just the helpers that templates rely on: those of transformers' `apply_chat_template`.
"""

import json
import re
import secrets
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minilora.errors import InputError

Message = dict[str, Any]
Span = tuple[int, int]

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # templates read one of the first two

# `{% generation %}` writes these around what the assistant says; `render` finds them and takes them out again.
# They are drawn anew in each process, so that no message can contain them.
BEGIN = f"[generation {secrets.token_hex(16)}]"
END = f"[endgeneration {secrets.token_hex(16)}]"
MARK = re.compile(re.escape(BEGIN) + "|" + re.escape(END))


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
    template = _compile(source)
    given = {"messages": [_completed(message) for message in messages], "tools": tools}
    values = _plain({"documents": None, **variables, **given})
    try:
        marked = template.render(**values, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise InputError(f"the chat template refuses this conversation: {_one_line(error)}") from error
    except Exception as error:  # a template is a program: any exception may come out of it
        kind = type(error).__name__
        raise InputError(f"the chat template fails on this conversation: {kind}: {_one_line(error)}") from error
    return _take_out_marks(marked)


def _completed(message: Message) -> Message:
    """The message as templates expect it: null is a missing key, and an answer's thoughts go by all their names.

    An exported `"content": null` beside tool calls must not render as the word None; and thoughts under another name
    than the template reads would silently not be there.
    """
    present = {key: value for key, value in message.items() if value is not None}
    thoughts = next((present[name] for name in THOUGHTS if name in present), None)
    return present if thoughts is None else {**dict.fromkeys(THOUGHTS[:2], thoughts), **present}


def _take_out_marks(marked: str) -> tuple[str, list[Span]]:
    pieces: list[str] = []
    spans: list[Span] = []
    length = begin = position = 0
    for mark in MARK.finditer(marked):
        pieces.append(marked[position : mark.start()])
        length += mark.start() - position
        position = mark.end()
        if mark.group() == BEGIN:
            begin = length
        else:
            spans.append((begin, length))
    pieces.append(marked[position:])
    return "".join(pieces), spans


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A copy made of dict, list, str, int, float, bool and None: nothing that a template could call or change."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        raise InputError(f"messages, tools and template variables must be JSON values: {error}") from error
    return copy


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@cache
def _compile(source: str) -> Template:
    try:
        return ENVIRONMENT.from_string(source)
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template does not parse, line {error.lineno}: {_one_line(error)}") from error
    except TemplateError as error:
        raise InputError(f"the chat template does not compile: {_one_line(error)}") from error


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant says, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 (Jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
        return nodes.Scope([begin, *body, end]).set_lineno(line)


class _SafeNamespace(Namespace):
    """`namespace()` without underscore names: Python looks some of those up behind the sandbox's back."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a chat template may not set the attribute {name!r}")
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    space = _SafeNamespace()
    for name, value in dict(*args, **kwargs).items():
        space[name] = value
    return space


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)  # the class itself would hand out dict.update, which changes its argument


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja2's own filter writes < as \u003c, for HTML's sake; a model should read the text itself.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
)
ENVIRONMENT.filters["tojson"] = _tojson
ENVIRONMENT.globals.update(
    raise_exception=_raise_exception,
    strftime_now=lambda format: datetime.now().strftime(format),
    namespace=_namespace,
    dict=_make_dict,
)
