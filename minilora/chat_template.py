"""A chat template: the Jinja2 program with which a model's authors turn a conversation into one string.

It comes from a stranger's file, so it runs in Jinja2's immutable sandbox, sees plain JSON values only, and gets the
few helpers that templates on the Hub rely on: those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import re
import secrets
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from minilora.errors import InputError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]
Span = tuple[int, int]

# `{% generation %}` writes these around what the assistant says; `render` finds them and takes them out. They are
# drawn anew in each process, so that no message can contain them.
_BEGIN = f"[generation {secrets.token_hex(16)}]"
_END = f"[endgeneration {secrets.token_hex(16)}]"
_MARK = re.compile(re.escape(_BEGIN) + "|" + re.escape(_END))


class ChatTemplate:
    """One compiled chat template.

    Raises:
        InputError: the source is not valid Jinja2.
    """

    def __init__(self, source: str) -> None:
        from jinja2 import TemplateSyntaxError

        self.source = source
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise InputError(
                f"the chat template does not parse, line {error.lineno}: {error.message}"
            ) from error

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> tuple[str, list[Span]]:
        """Render a conversation; also return the character spans inside `{% generation %}`, in order.

        Raises:
            InputError: the template refuses the conversation (its own words are in the message) or fails on it, or a
                message, tool or variable is not made of JSON values.
        """
        from jinja2 import TemplateError

        # A key whose value is null is a key that is not there: an exported `"content": null` beside tool calls must
        # not render as the word None.
        present = [
            {key: value for key, value in message.items() if value is not None} for message in messages
        ]
        try:
            marked = self._template.render(
                messages=_plain(present, "messages"),
                tools=_plain(tools, "tools"),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **_plain(variables, "template variables"),
            )
        except TemplateError as error:
            raise InputError(f"the chat template refuses this conversation: {error.message}") from error
        except InputError:
            raise
        except Exception as error:  # a template is a program: any exception may come out of it
            raise InputError(
                f"the chat template fails on this conversation: {type(error).__name__}: {error}"
            ) from error
        return _take_out_marks(marked)


def _take_out_marks(marked: str) -> tuple[str, list[Span]]:
    pieces: list[str] = []
    spans: list[Span] = []
    length = begin = position = 0
    for mark in _MARK.finditer(marked):
        piece = marked[position : mark.start()]
        pieces.append(piece)
        length += len(piece)
        position = mark.end()
        if mark.group() == _BEGIN:
            begin = length
        else:
            spans.append((begin, length))
    pieces.append(marked[position:])
    return "".join(pieces), spans


def _plain(value: Any, what: str) -> Any:
    """A copy made of dict, list, str, int, float, bool and None: nothing a template could call or change for us."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be made of JSON values only ({error})") from error


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.ext import loopcontrols as LoopControls
    from jinja2.parser import Parser
    from jinja2.runtime import Namespace
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}`: the assistant's words, in a scope of their own."""

        tags = {"generation"}  # noqa: RUF012 (Jinja2's own attribute)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin = nodes.Output([nodes.TemplateData(_BEGIN)])
            end = nodes.Output([nodes.TemplateData(_END)])
            return nodes.Scope([begin, *body, end]).set_lineno(line)

    class SafeNamespace(Namespace):
        """`namespace()` without underscore names: Python looks some of those up behind the sandbox's back."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a chat template may not set the attribute {name!r}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **kwargs: Any) -> Namespace:
        space = SafeNamespace()
        for name, value in dict(*args, **kwargs).items():
            space[name] = value
        return space

    def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(
            *args, **kwargs
        )  # the class itself would hand out `dict.update`, which changes its argument

    def raise_exception(message: str) -> None:
        raise TemplateError(str(message))

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja2's own filter writes < as \u003c, for HTML; a model should read the text itself.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControls]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, namespace=namespace, dict=make_dict
    )
    return environment
