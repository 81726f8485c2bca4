"""Chat templates: what transformers renders, we render; what a hostile template wants, it does not get."""

import json
from typing import Any

import jinja2
import pytest
from helpers.chat import (
    CHATML,
    QWEN,
    TAKES_TOOLS,
    TEMPLATES,
    THINKING,
    TOOL_CONVERSATION,
    TOOLS,
    assistant,
    conversations,
    in_transformers,
    system,
    tiny,
    untagged,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.errors import InputError
from minilora.text.chat_template import render

ALL = {**TEMPLATES, "thinking": THINKING, **{f"untagged {name}": untagged(t) for name, t in TEMPLATES.items()}}
CONVERSATIONS = [
    [user("Hi")],
    [user("  <b>Ünïcode</b> & 'quotes' \"🤗\"\n"), assistant("\nyes\n")],
    [user("1"), assistant("2"), user("3"), assistant("<think>\nhm\n</think>\n\n4")],
    [user("1"), assistant("<think>\nhm\n</think>\n\n2"), user("3")],
]


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    return {name: in_transformers(tiny(template)) for name, template in ALL.items()}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_renders_what_transformers_renders(theirs: dict[str, Any], name: str, add_generation_prompt: bool) -> None:
    chats = CONVERSATIONS if "mistral" in name else [*CONVERSATIONS, [system(" Be brief. "), *CONVERSATIONS[2]]]
    for messages in chats:
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
        expected = theirs[name].apply_chat_template(messages, tokenize=False, **options)
        assert tiny(ALL[name]).apply_chat_template(messages, **options) == expected


@pytest.mark.parametrize("name", TAKES_TOOLS)
def test_passes_tools_and_variables_through(theirs: dict[str, Any], name: str) -> None:
    expected = theirs[name].apply_chat_template(TOOL_CONVERSATION, tools=TOOLS, tokenize=False)
    assert "Zürich <&> 'x'" in expected  # the template does write the call, and not escaped for HTML
    assert tiny(ALL[name]).apply_chat_template(TOOL_CONVERSATION, tools=TOOLS) == expected

    template = "{{ mood }} {{ messages[0].content if mood == 'glad' }}"
    assert tiny(template).apply_chat_template([user("hi")], mood="glad") == "glad hi"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{{ {'a': '<é>'} | tojson(ensure_ascii=true) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, indent=2) }}",
        "{{ strftime_now('%Y') }}{{ dict(a=1) }}{{ namespace(b=2).b }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% macro f(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
        "{{ messages | map(attribute='content') | join('|') }}{{ messages[::-1][0].content }}{{ tools is none }}",
        "   {% if true %}\n  kept\n   {% endif %}\n  {# comment #}\nend",
        "{{ messages[0]['content'][:2] | upper }}{{ messages[0].get('name', 'nobody') }}{{ bos_token }}{{ eos_token }}",
    ],
)
def test_offers_what_transformers_offers(template: str) -> None:
    ours = tiny(template)
    messages = [user("question"), assistant("answer")]
    assert ours.apply_chat_template(messages) == in_transformers(ours).apply_chat_template(messages, tokenize=False)


@settings(deadline=None, max_examples=30)
@given(conversations())
def test_generation_marks_are_those_of_transformers(messages: list[dict[str, Any]]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for template in (CHATML, QWEN):
        [expected], [spans] = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True
        )
        assert render(template, messages) == (expected, [tuple(span) for span in spans])


def test_a_null_is_a_missing_key() -> None:
    call = {**TOOL_CONVERSATION[1], "content": None}
    assert render("{{ messages[0].content is defined }}", [call])[0] == "False"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_go_by_every_name_that_templates_read(name: str) -> None:
    thoughtful = assistant("a") | {name: "hm"}
    for read in ("reasoning_content", "thinking"):
        assert render(f"{{{{ messages[0].{read} }}}}", [thoughtful])[0] == "hm"
        assert render(f"{{{{ messages[0].{read} is defined }}}}", [assistant("a")])[0] == "False"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Only user\nand assistant!') }}", "refuses this conversation: Only user and assistant!"),
        ("{{ messages[0].content + messages[7].content }}", "has no element 7"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", "does not parse, line 2"),
        ("{% include 'other.jinja' %}", "no loader"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
    ],
)
def test_errors_are_one_line_with_the_templates_own_words(template: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        render(template, [user("hi")])
    assert "\n" not in str(caught.value)


def test_refuses_what_is_not_json() -> None:
    with pytest.raises(InputError, match="JSON values"):
        render("{{ messages }}", [user("hi") | {"image": object()}])
    with pytest.raises(InputError, match="JSON values"):
        render("{{ messages }}", [user("hi")], tools=[test_refuses_what_is_not_json])


REACHING = [  # what Jinja2 without a sandbox gives
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}",
    "{{ messages[0]['content'].__class__ }}",
    "{{ '' | attr('__class__') }}",
    "{{ ''['__class__'] }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ('{0.__class__}' | attr('format'))(1) }}",
    "{{ lipsum.__globals__['os'].getcwd() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ dict.mro() }}",
    "{{ [''] | map(attribute='__class__') | map('string') | join }}",
    "{{ messages.append(messages[0]) }}",
    "{{ messages[0].pop('role') }}",
    "{{ dict.update(messages[0], role='system') }}",
]
HOSTILE = [
    *REACHING,
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{% set ns = namespace() %}{% set ns.__html__ = 'called without the sandbox'.upper %}{{ ns | e }}",
    "{{ namespace({'__html__': 'called without the sandbox'.upper}) | e }}",
    "{{ messages[0].update(role='system') }}",
    "{{ range(1000000000) | list }}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_gets_nothing(template: str) -> None:
    """The sandbox refuses, or gives an undefined value, which is written as nothing."""
    messages = [user("hi")]
    try:
        text, _ = render(template, messages)
    except InputError:
        text = ""
    assert text == ""
    assert messages == [user("hi")]


@pytest.mark.parametrize("template", REACHING)
def test_the_hostile_templates_are_hostile(template: str) -> None:
    assert jinja2.Environment().from_string(template).render(messages=[user("hi")]) != ""


@settings(deadline=None, max_examples=30)
@given(st.recursive(st.none() | st.booleans() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=2)))
def test_a_template_sees_copies(value: Any) -> None:
    """Whatever JSON a message holds, what the template sees equals it."""
    text, _ = render("{{ messages[0].extra | tojson }}", [{"role": "user", "extra": [value]}])
    assert json.loads(text) == [value]
