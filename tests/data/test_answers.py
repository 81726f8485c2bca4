"""Where the answers are: what the template marks, what generation would write, or a refusal."""

import json
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
    system,
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
    text, spans, *_ = render_with_answers(Row(messages=messages, **row), tiny(template), [turn_end])
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
    _, spans, *_ = expected
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
    template = """{% for m in messages %}<|{{ m.role }}|>
        {%- if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% elif m.role == 'assistant' -%}
        {% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"""
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    messages = [user("q"), {"role": "assistant", "tool_calls": [CALL]}, *TOOL_CONVERSATION[2:]]
    assert answers(template, messages, "<|end|>") == [
        json.dumps(CALL["function"], ensure_ascii=False) + "<|end|>",
        "21 °C.<|end|>",
    ]


def test_what_follows_the_last_answer_is_not_the_answers() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[0].content }}"
    messages = [user("question"), assistant("first"), user("another"), assistant("second")]
    assert answers(template, messages) == ["first", "second"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        # the questions go to the end, after the answers
        (
            "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "answers cannot be told apart",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out message 2, an answer"),
        (
            "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves out message 2, an answer",
        ),
        ("{% for m in messages[1:] %}{{ m.content }}{% endfor %}", "leaves out message 1, the user's"),
    ],
)
def test_refuses_rather_than_guess(template: str, words: str) -> None:
    messages = [user("question"), assistant("first"), user("another"), assistant("second")]
    with pytest.raises(InputError, match=words):
        answers(template, messages)


LINES = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"  # calls are not written
SHORT = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"  # thoughts are cut


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (LINES, [user("q"), assistant("") | {"tool_calls": [CALL]}], "a tool call of message 2, an answer"),
        (LINES, [user("q"), assistant("Let me see.") | {"tool_calls": [CALL]}], "a tool call of message 2, an answer"),
        (LINES, [user("q"), assistant("a") | {"reasoning_content": "hm"}], "thoughts of message 2, the last answer"),
        (SHORT, [user("q"), assistant("<think>hm</think>a")], "thoughts of message 2, the last answer"),
        (SHORT, [user("q"), assistant("hm</think>a")], "thoughts of message 2, the last answer"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content ~ '<|im_end|>' }}{% endfor %}",
            [system("s"), user("q"), assistant("a")],
            "message 1, the system's",
        ),
        (
            "{% for m in messages if m.role != 'tool' %}"
            "{{ m.content or m.tool_calls[0].function | tojson }}{% endfor %}",
            TOOL_CONVERSATION,
            "message 3, the tool's",
        ),
    ],
)
def test_refuses_what_the_template_leaves_out(template: str, messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InputError, match=f"the chat template leaves out .*{words}"):
        answers(template, messages)


def test_thoughts_of_earlier_answers_may_be_left_out_and_are_reported() -> None:
    messages = [user("q"), assistant("<think>hm</think>a"), user("r"), assistant("b")]
    _, _, remarks, _ = render_with_answers(Row(messages), tiny(SHORT), ["<|im_end|>"])
    assert any("leaves out the thoughts of earlier answers" in remark for remark in remarks)
    _, _, remarks, _ = render_with_answers(Row(messages[2:]), tiny(SHORT), ["<|im_end|>"])
    assert remarks == []


def test_a_prompt_that_ends_otherwise_when_the_model_is_used_is_reported() -> None:
    template = LINES + "{% if add_generation_prompt %}{{ 'assistant: <think>\n' }}{% endif %}"
    text, [(start, end)], [remark], _ = render_with_answers(
        Row([user("q"), assistant("a")]), tiny(template), ["<|im_end|>"]
    )
    assert text[start:end] == "a<|im_end|>"
    assert "ends the prompt with '<think>\\n'" in remark


def test_a_key_that_the_template_does_not_read_is_reported() -> None:
    messages = [user("q") | {"name": "Al"}, assistant("a")]
    _, _, [remark], _ = render_with_answers(Row(messages), tiny(LINES), ["<|im_end|>"])
    assert "does not read 'name'" in remark
    named = LINES.replace("m.role", "m.role ~ (m.name or '')")
    text, _, remarks, _ = render_with_answers(Row(messages), tiny(named), ["<|im_end|>"])
    assert remarks == []
    assert text.startswith("userAl: q")


@pytest.mark.parametrize("template", [CHATML, untagged(CHATML)])
def test_answers_that_are_not_to_be_learned(template: str) -> None:
    messages = [user("q"), assistant("a") | {"weight": 0}, user("r"), assistant("b"), user("s"), assistant("c")]
    assert answers(template, messages) == ["b<|im_end|>", "c<|im_end|>"]
    _, spans, *_ = render_with_answers(Row(messages), tiny(template), ["<|im_end|>"], mask_history=True)
    assert len(spans) == 1


@pytest.mark.parametrize("template", [CHATML, untagged(CHATML)])
def test_conversations_of_other_shapes(template: str) -> None:
    """Begun by the assistant, two turns of one role in a row, ended by the user, a system message in the middle."""
    messages = [assistant("a"), user("q"), user("r"), assistant("b"), assistant("c"), system("s"), user("t")]
    found = answers(template, messages)
    assert found[1:] == ["b<|im_end|>", "c<|im_end|>"]
    assert found[0].endswith("a<|im_end|>")


def test_a_results_place_between_two_answers_of_one_turn() -> None:
    """As in Gemma 4: a call, its result and the answer stand in one turn, without a header between them."""
    template = """{% for m in messages %}{% if m.role == 'user' %}<|turn>user
{{ m.content }}<turn|>
<|turn>model
{% elif m.role == 'tool' %}<|response>{{ m.content }}<response|>{% elif m.tool_calls -%}
<|call>{{ m.tool_calls[0].function.name }}:{{ m.tool_calls[0].function.arguments.city }}<call|>{% else -%}
{{ m.content }}<turn|>
{% endif %}{% endfor %}"""
    found = answers(template, TOOL_CONVERSATION, "<turn|>")
    assert found == ["<|call>weather:Zürich <&> 'x'<call|>", "21 °C.<turn|>"]


@pytest.mark.parametrize("arguments", ["{{ c.arguments | tojson }}", "{{ c.arguments }}", "{{ c.arguments | string }}"])
def test_arguments_are_written_as_json_however_the_template_takes_them(arguments: str) -> None:
    """An object for templates that write JSON, a string of JSON for those that write what they get."""
    template = (
        "{% for m in messages %}{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}{{ c.name }}:ARGUMENTS"
        "{% else %}{{ m.role ~ ': ' + m.content }}{% endif %}<|im_end|>{% endfor %}"
    ).replace("ARGUMENTS", arguments)
    call = {"type": "function", "function": {"name": "f", "arguments": {"on": True, "to": "Zürich"}}}
    [found] = answers(template, [user("q"), {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert found == 'f:{"on": true, "to": "Zürich"}<|im_end|>'


@pytest.mark.parametrize(
    "content", ["{{ '' + m.content }}", "{{ m.content if m.content is not none }}", "{{ m['content'] or '' }}"]
)
def test_a_call_without_content_in_every_template(content: str) -> None:
    template = (
        "{% for m in messages %}" + content + "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "<|im_end|>{% endfor %}"
    )
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}, assistant("")):
        [found] = answers(template, [user("q"), message | {"tool_calls": [CALL]}])
        assert found == json.dumps(CALL["function"], ensure_ascii=False) + "<|im_end|>"


@pytest.mark.parametrize("content", ["content[0]['text']", "content | map(attribute='text') | join"])
def test_a_template_that_takes_content_in_parts(content: str) -> None:
    """As those of most vision-language models: a string in their place would come out as nothing."""
    template = "{% for m in messages %}{{ m.role ~ ': ' ~ m." + content + " ~ '<|im_end|>' }}{% endfor %}"
    assert answers(template, [user("q"), assistant("a")]) == ["assistant: a<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, untagged(CHATML), THINKING])
def test_a_conversation_is_rendered_a_few_times_however_long_it_is(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each turn would take time quadratic in the turns."""
    tokenizer, rendered = tiny(template), []
    render = tokenizer.render_chat
    monkeypatch.setattr(tokenizer, "render_chat", lambda *args, **kwargs: rendered.append(1) or render(*args, **kwargs))
    turns = [[user(f"question {i}"), assistant(f"<think>hm {i}</think>answer {i}")] for i in range(100)]
    _, spans, *_ = render_with_answers(Row([message for turn in turns for message in turn]), tokenizer, ["<|im_end|>"])
    assert len(spans) == 100
    assert len(rendered) <= 6


def test_refuses_tools_that_are_not_shown() -> None:
    messages = [user("question"), assistant("answer")]
    with pytest.raises(InputError, match="leaves out the tools"):
        answers(CHATML, messages, tools=TOOLS)
    assert answers(TEMPLATES["qwen"], messages, tools=TOOLS) == ["answer<|im_end|>"]
