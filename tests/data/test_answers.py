"""Where the answers are: what the template marks, what generation would write, or a refusal."""

from typing import Any

import pytest
from helpers.chat import (
    CALL,
    CHATML,
    TAKES_TOOLS,
    TEMPLATES,
    THINKING,
    TOOL_CONVERSATION,
    TOOLS,
    TURN_END,
    assistant,
    conversations,
    tiny,
    untagged,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data.answers import render_with_answers
from minilora.data.rows import Row
from minilora.errors import InputError


def answers(template: str, messages: list[dict[str, Any]], turn_end: str = "<|im_end|>", **row: Any) -> list[str]:
    text, spans = render_with_answers(Row(messages=messages, **row), tiny(template), [turn_end])
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(messages=conversations(), context=st.integers(0, 4))
def test_prefixes_find_what_the_template_marks(name: str, messages: list[dict[str, Any]], context: int) -> None:
    """The marked template and the same without marks, from which the answers must be inferred: one result."""
    row = Row(messages=messages, context=min(context, len(messages) - 1))
    marked, bare = tiny(TEMPLATES[name]), tiny(untagged(TEMPLATES[name]))
    expected = render_with_answers(row, marked, [TURN_END[name]])
    assert render_with_answers(row, bare, [TURN_END[name]]) == expected
    _, spans = expected
    assert len(spans) == sum(m["role"] == "assistant" for m in messages[row.context :])


@pytest.mark.parametrize("name", TAKES_TOOLS)
def test_a_tool_call_is_an_answer(name: str) -> None:
    end = TURN_END[name]
    for template in (TEMPLATES[name], untagged(TEMPLATES[name])):
        call, reply = answers(template, TOOL_CONVERSATION, end, tools=TOOLS)
        assert "weather" in call
        assert "Zürich <&> 'x'" in call
        assert call.endswith(end)
        assert reply == "21 °C." + end


def test_chatml_by_hand() -> None:
    messages = [user("q1"), assistant("a1 <|im_end|> still"), user("q2"), assistant("\n a2 \n")]
    for template in (CHATML, untagged(CHATML)):
        assert answers(template, messages) == ["a1 <|im_end|> still<|im_end|>", "\n a2 \n<|im_end|>"]
        assert answers(template, messages, context=2) == ["\n a2 \n<|im_end|>"]


THOUGHT = "<think>\nhm\n</think>\n\n"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("q"), assistant("a")], ["<think>\n\n</think>\n\na<|im_end|>"]),
        ([user("q"), assistant(THOUGHT + "a")], [THOUGHT + "a<|im_end|>"]),
        # An earlier answer stands in the text without its thoughts, so that is what is learned of it.
        (
            [user("q"), assistant(THOUGHT + "a"), user("q"), assistant(THOUGHT + "b")],
            ["a<|im_end|>", THOUGHT + "b<|im_end|>"],
        ),
        (
            [user("a"), assistant("a"), user("a"), assistant("a"), user("a"), assistant("a")],
            ["a<|im_end|>", "a<|im_end|>", "<think>\n\n</think>\n\na<|im_end|>"],
        ),
    ],
)
def test_a_template_that_drops_earlier_thoughts(messages: list[dict[str, Any]], expected: list[str]) -> None:
    assert answers(THINKING, messages) == expected


@settings(deadline=None, max_examples=60)
@given(messages=conversations())
def test_the_dropped_thoughts_change_nothing_else(messages: list[dict[str, Any]]) -> None:
    found = answers(THINKING, messages)
    *earlier, last = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
    assert found == [*earlier, "<think>\n\n</think>\n\n" + last]


def test_a_generation_prompt_that_the_whole_does_not_have() -> None:
    """As DeepSeek-R1's: generation starts inside a thought, earlier and later answers stand without one."""
    template = (
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content.split('</think>')[-1] ~ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    )
    messages = [user("q"), assistant("hm</think>a"), user("r"), assistant("b")]
    assert answers(template, messages, "<|end|>") == ["a<|end|>", "b<|end|>"]


def test_an_end_that_only_the_last_turn_has() -> None:
    template = "{% for m in messages %}{{ '<|user|>' if m.role == 'user' }}{{ m.content }}{% endfor %}{{ eos_token }}"
    messages = [user("q"), assistant("a"), user("r"), assistant("b")]
    assert answers(template, messages, "</s>") == ["a", "b</s>"]


def test_what_a_template_writes_before_an_answer_is_generated_too() -> None:
    """Generation begins after the header, so the space is the answer's, though only the last turn has an end."""
    template = (
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|> ' ~ m.content }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
    )
    messages = [user("q"), assistant("a"), user("r"), assistant("b")]
    assert answers(template, messages, "</s>") == [" a", " b</s>"]


def test_white_space_after_the_turns_end_is_not_the_answers() -> None:
    template = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '<|end|>' ~ ' \n' }}{% endfor %}"
    assert answers(template, [user("q"), assistant("a ")], "<|end|>") == ["assistant: a <|end|>"]  # no header is given
    bare = "{% for m in messages %}{{ m.content ~ '\n' }}{% endfor %}"
    assert answers(bare, [user("q"), assistant("a")], "<|end|>") == ["a\n"]  # its turn's end is the line's


def test_a_template_that_marks_some_answers_only_is_not_relied_on() -> None:
    template = """{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}call{% elif m.role == 'assistant' -%}
        {% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"""
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    messages = [user("q"), {"role": "assistant", "tool_calls": [CALL]}, *TOOL_CONVERSATION[2:]]
    assert answers(template, messages, "<|end|>") == ["call<|end|>", "21 °C.<|end|>"]


def test_what_follows_the_last_answer_is_not_the_answers() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[0].content }}"
    messages = [user("question"), assistant("first"), user("another"), assistant("second")]
    assert answers(template, messages) == ["first", "second"]


@pytest.mark.parametrize(
    "template",
    [
        # the questions go to the end, after the answers
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        # the answers are not there at all
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        # earlier answers are left out
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}",
    ],
)
def test_refuses_rather_than_guess(template: str) -> None:
    messages = [user("question"), assistant("first"), user("another"), assistant("second")]
    with pytest.raises(InputError, match="answers cannot be told apart"):
        answers(template, messages)


def test_refuses_an_answer_that_is_not_shown() -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="leaves out an answer"):
        answers(template, [user("question"), assistant("answer")])
    no_calls = "{% for m in messages %}{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    with pytest.raises(InputError, match="leaves out an answer"):
        answers(no_calls, [user("q"), assistant("") | {"tool_calls": [CALL]}])
    assert answers(no_calls, [user("q"), assistant("a")]) == ["a<|im_end|>"]


def test_refuses_tools_that_are_not_shown() -> None:
    messages = [user("question"), assistant("answer")]
    with pytest.raises(InputError, match="leaves out the tools"):
        answers(CHATML, messages, tools=TOOLS)
    assert answers(TEMPLATES["qwen"], messages, tools=TOOLS) == ["answer<|im_end|>"]
