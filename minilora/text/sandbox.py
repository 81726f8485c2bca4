"""Where a chat template runs: Jinja2's immutable sandbox, with just the helpers that templates rely on.

Those are transformers' own of `apply_chat_template`.
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

# `{% generation %}` writes these around what the assistant says; `render` finds them and takes them out again.
# They are drawn anew in each process, so that no message can contain them.
BEGIN = f"[generation {secrets.token_hex(16)}]"
END = f"[endgeneration {secrets.token_hex(16)}]"
MARK = re.compile(re.escape(BEGIN) + "|" + re.escape(END))


def render(source: str, values: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """What the template makes of these values, and the character spans in its `{% generation %}`.

    Raises InputError for a template that does not parse, refuses the values or fails on them.
    """
    template = _compile(source)
    try:
        marked = template.render(**values)
    except TemplateError as error:
        raise InputError(f"the chat template refuses this conversation: {_one_line(error)}") from error
    except Exception as error:  # a template is a program: any exception may come out of it
        kind = type(error).__name__
        raise InputError(f"the chat template fails on this conversation: {kind}: {_one_line(error)}") from error
    return _take_out_marks(marked)


def _take_out_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
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
