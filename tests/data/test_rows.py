"""Reading rows: every format means what it says, and no malformed row goes unnamed."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.chat import CALL, TOOL_CONVERSATION, TOOLS, assistant, system, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora.data.rows import Skipped, as_rows, load_rows
from minilora.errors import InputError

SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def save(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, [user("q"), assistant("a")]),
        ({"instruction": "q", "output": "a", "text": "Below is"}, [user("q"), assistant("a")]),
        ({"instruction": "q", "input": "i", "output": "a"}, [user("q\n\ni"), assistant("a")]),
        ({"instruction": "q", "input": None, "output": "a", "system": "s"}, [system("s"), user("q"), assistant("a")]),
        (
            {"instruction": "q", "output": "a", "history": [["p", "b"]], "system": "s"},
            [system("s"), user("p"), assistant("b"), user("q"), assistant("a")],
        ),
        (SHAREGPT, [user("q"), assistant("a")]),
        (SHAREGPT | {"system": "s", "id": 7}, [system("s"), user("q"), assistant("a")]),
        (
            {"conversations": [{"from": "system", "value": "s"}, *SHAREGPT["conversations"] * 2]},
            [system("s"), *[user("q"), assistant("a")] * 2],
        ),
        ({"conversations": [user("q"), assistant("a")]}, [user("q"), assistant("a")]),
        ({"messages": [user("q"), assistant("a")], "prompt": "q"}, [user("q"), assistant("a")]),
        ({"messages": [user("q") | {"name": "Al"}, assistant("a")]}, [user("q") | {"name": "Al"}, assistant("a")]),
        ({"messages": TOOL_CONVERSATION}, TOOL_CONVERSATION),
        ({"messages": [user("q"), assistant("") | {"tool_calls": [CALL]}]}, None),
        ({"prompt": "q", "completion": "a"}, [user("q"), assistant("a")]),
        (
            {"prompt": [system("s"), user("q")], "completion": [assistant("a")]},
            [system("s"), user("q"), assistant("a")],
        ),
    ],
)
def test_formats(value: dict[str, Any], messages: list[dict[str, Any]] | None) -> None:
    [row] = as_rows([value])
    assert row.messages == (value["messages"] if messages is None else messages)
    assert row.text is None
    assert row.meta is value
    assert row.source == "row 1"
    assert row.pair == isinstance(value.get("completion"), str)
    assert row.context == (len(value["prompt"]) if isinstance(value.get("completion"), list) else 0)


WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        # OpenAI's form: arguments as a string of JSON; nulls and empty lists that an export writes
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
                ],
            },
            {"role": "assistant", "tool_calls": [{"id": "c1", **WEATHER}]},
        ),
        (
            {
                "role": "assistant",
                "content": "a",
                "tool_calls": [],
                "function_call": None,
                "refusal": None,
                "audio": None,
            },
            assistant("a"),
        ),
        # OpenAI's older form
        (
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"city": "Bern"}'},
            },
            {"role": "assistant", "tool_calls": [WEATHER]},
        ),
        (
            {"role": "function", "name": "weather", "content": "21"},
            {"role": "tool", "name": "weather", "content": "21"},
        ),
        # ShareGPT's, as LLaMA-Factory and ms-swift write it
        (
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
            {"role": "assistant", "tool_calls": [WEATHER]},
        ),
        ({"from": "observation", "value": "21"}, {"role": "tool", "content": "21"}),
        (
            {"from": "gpt", "value": "a", "reasoning_content": "hm", "tool_calls": [WEATHER]},
            {"role": "assistant", "content": "a", "reasoning_content": "hm", "tool_calls": [WEATHER]},
        ),
        ({"role": "assistant", "tool_calls": json.dumps([WEATHER])}, {"role": "assistant", "tool_calls": [WEATHER]}),
        ({"role": "assistant", "tool_calls": [WEATHER["function"]]}, {"role": "assistant", "tool_calls": [WEATHER]}),
        # content in parts
        (user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), user("a\nb")),
        (assistant([{"type": "text", "value": "a"}]), assistant("a")),
        ({"role": "developer", "content": "Be brief."}, {"role": "developer", "content": "Be brief."}),
        ({"role": "model", "content": "a"}, assistant("a")),
    ],
)
def test_turns_of_every_writer(turn: dict[str, Any], message: dict[str, Any]) -> None:
    for key in ("messages", "conversations"):
        [row] = as_rows([{key: [user("q"), turn, assistant("end")]}])
        assert row.messages == [user("q"), message, assistant("end")]


MARKED = [
    *({"weight": value} for value in (0, 0.0, False, "0")),
    *({name: False} for name in ("train", "training", "trainable", "loss", "loss_weight")),
    {"train": "false"},
    {"masked": True},
    {"mask": 1},
]


@pytest.mark.parametrize("mark", MARKED)
def test_an_answer_marked_as_not_to_be_learned(mark: dict[str, Any]) -> None:
    for turns in ([user("q"), assistant("a")], SHAREGPT["conversations"]):
        key = "messages" if "role" in turns[0] else "conversations"
        [row] = as_rows([{key: [turns[0], turns[1] | mark, *turns]}])
        assert row.messages == [user("q"), assistant("a") | {"weight": 0}, user("q"), assistant("a")]
    [row] = as_rows([{"prompt": [user("q")], "completion": [assistant("a") | mark, user("r"), assistant("b")]}])
    assert row.messages is not None
    assert row.messages[1]["weight"] == 0


@pytest.mark.parametrize("mark", [{"weight": 1}, {"weight": None}, {"train": True}, {"loss": 1.0}, {"masked": False}])
def test_marks_that_say_what_is_done_anyway(mark: dict[str, Any]) -> None:
    [row] = as_rows([{"messages": [user("q"), assistant("a") | mark]}])
    assert row.messages == [user("q"), assistant("a")]
    if "weight" in mark:
        [row] = as_rows([{"messages": [user("q") | mark, assistant("a")]}])
        assert row.messages == [user("q"), assistant("a")]


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(
    "value",
    [
        {"messages": [user("q"), assistant("a")]},
        SHAREGPT,
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [user("q")], "completion": [assistant("a")]},
        {"messages": [system("s"), user("q"), assistant("a")]},
    ],
)
def test_a_system_message_beside_every_format(key: str, value: dict[str, Any]) -> None:
    [row] = as_rows([{**value, key: "s"}])
    assert row.messages == [system("s"), user("q"), assistant("a")]
    assert row.context == (2 if isinstance(value.get("prompt"), list) else 0)


def test_tools_beside_every_format() -> None:
    function = TOOLS[0]["function"]
    for value in ({"instruction": "q", "output": "a"}, {"prompt": "q", "completion": "a"}, SHAREGPT):
        for key, tools in (("tools", TOOLS), ("tools", json.dumps(TOOLS)), ("functions", [function])):
            [row] = as_rows([{**value, key: tools}])
            assert row.tools == TOOLS


def test_keys_that_are_not_used_are_named() -> None:
    [row] = as_rows([SHAREGPT | {"id": 7, "source": "x", "text": "Below is", "note": None, "tags": []}])
    assert row.unused == ("id", "source", "text")
    [row] = as_rows([{"prompt": "q", "completion": "a", "chat_template_kwargs": {"enable_thinking": False}}])
    assert row.unused == ()
    assert row.chat_template_kwargs == {"enable_thinking": False}


def test_bad_rows_can_be_left_out_and_are_listed(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.jsonl", '{"text": "a"}\nnonsense\n{"text": ""}\n')
    with pytest.raises(InputError, match=r"2 of 3 rows cannot be used: .*; skip_bad_rows leaves them out"):
        load_rows(path)
    skipped: list[Skipped] = []
    assert [row.text for row in load_rows(path, skipped)] == ["a"]
    assert [(row.source, row.reason) for row in skipped] == [
        ("rows.jsonl:2", "not valid JSON: Expecting value at column 1"),
        ("rows.jsonl:3", "the text is empty"),
    ]
    with pytest.raises(InputError, match="1 of 1 rows cannot be used"):
        as_rows([{"text": ""}], skipped)


def test_text_and_tools() -> None:
    [row] = as_rows([{"text": "once upon\na time "}])
    assert (row.text, row.messages) == ("once upon\na time ", None)
    for tools in (TOOLS, json.dumps(TOOLS)):
        [row] = as_rows([{"messages": TOOL_CONVERSATION, "tools": tools}])
        assert row.tools == TOOLS
    for none in (None, [], ""):
        [row] = as_rows([{"messages": TOOL_CONVERSATION, "tools": none}])
        assert row.tools is None


BAD = [
    ({"messages": [user("q")]}, "there is no answer: no message is the assistant's"),
    ({"messages": []}, "no messages"),
    (
        {"messages": [user("q"), assistant("a") | {"weight": 0}]},
        "no answer to learn: all are marked as only to be read",
    ),
    ({"messages": [user("q"), assistant("a") | {"weight": 0.5}]}, "message 2 has weight: 0.5"),
    ({"messages": [user("q"), assistant("a") | {"weight": 1, "train": False}]}, "message 2 has marks that disagree"),
    ({"messages": [user("q") | {"train": True}, assistant("a")]}, "message 1, the user's, is marked train: True"),
    ({"messages": [user("q"), assistant("a") | {"train_detail": [{"train": False}]}]}, "message 2 has 'train_detail'"),
    ({"messages": [user("q"), {"role": "assistant", "content": None, "refusal": "no"}]}, "message 2 has 'refusal'"),
    ({"instruction": "q", "output": "a", "history": [["p"]]}, "history is a list of"),
    ({"messages": "q"}, "messages is a list, not a string"),
    ({"messages": ["q"]}, "message 1 is a JSON object, not a string"),
    ({"messages": [user("q"), assistant(" \n")]}, "message 2, an answer, is empty"),
    ({"messages": [user("q"), {"role": "assistant"}]}, "message 2: the content is missing"),
    ({"messages": [user("q"), assistant(3)]}, "message 2: the content is a string, not a number"),
    (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant("a")]},
        r"message 1: the content has a part that is no text \(image_url\)",
    ),
    ({"messages": [user("q") | {"tool_calls": [CALL]}, assistant("a")]}, "message 1, the user's, has tool_calls"),
    (
        {"messages": [user("q"), assistant("") | {"tool_calls": ["f"]}]},
        "message 2: tool_calls is a list of JSON objects",
    ),
    (
        {"messages": [user("q"), assistant("") | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "message 2: the arguments of f: not valid JSON",
    ),
    (
        {"messages": [user("q"), assistant("") | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
        "message 2: the arguments of f are a JSON object, not a list",
    ),
    (
        {"messages": [user("q"), assistant("") | {"tool_calls": [{"function": {}}]}]},
        "message 2: a tool call has no name",
    ),
    ({"messages": [user("q"), {"role": "robot", "content": "a"}]}, "role 'robot'; known are system, developer, user"),
    ({"messages": [{"role": "user", "content": "q", "value": "r"}, assistant("a")]}, "message 1 has both 'value' and"),
    ({"messages": [system("s"), user("q"), assistant("a")], "system": "t"}, "two system messages, which differ"),
    (
        {"prompt": "q", "completion": "a", "system": "s", "system_prompt": "t"},
        r"several system messages \(system, system_prompt\), which differ",
    ),
    ({"text": "t", "system": "s"}, "it has 'system' beside a plain text"),
    ({"messages": [user("q"), assistant("a")], "images": ["x.png"]}, "it has 'images': only text is read"),
    ({"messages": [user("q"), assistant("a")], "weight": 0.5}, "it has 'weight': all rows weigh the same"),
    ({"messages": [user("q"), assistant("a")], "tools": TOOLS, "functions": TOOLS}, "both tools and functions"),
    ({"messages": [user("q"), assistant("a")], "chat_template_kwargs": 3}, "chat_template_kwargs is an object, not a"),
    ({"messages": [user("q")], "rejected_response": "b"}, "rejected_response"),
    ({"prompt": "q", "completion": "a", "label": False}, r"preference .*\(label\)"),
    ({"instruction": "q", "output": "a", "chosen": "a", "rejected": "b"}, r"preference row .*\(chosen, rejected\)"),
    ({"messages": [user("q"), {"role": ["x"], "content": "a"}]}, r"role \['x'\]"),
    ({"messages": [user("q"), {"content": "a"}]}, "role None"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]}, "message 2: the content is missing"),
    ({"conversations": [{"from": "alien", "value": "q"}]}, "role 'alien'"),
    ({"instruction": "q"}, "output is missing"),
    ({"instruction": "q", "output": ""}, "an answer, is empty"),
    ({"instruction": 5, "output": "a"}, "instruction is a string, not a number"),
    ({"instruction": "q", "input": ["i"], "output": "a"}, "input is a string, not a list"),
    ({"prompt": "q"}, "completion is missing"),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        r"a preference row \(chosen, rejected\): it is for preference training",
    ),
    ({"prompt": [user("q")], "completion": "a"}, "prompt is a string, not a list"),
    ({"prompt": [user("q"), assistant("a")], "completion": []}, "completion is empty"),
    ({"text": ""}, "text is empty"),
    ({"text": None}, "text is missing"),
    ({"question": "q", "answer": "a"}, "keys are 'question', 'answer'; a row has messages"),
    ({}, "keys are none"),
    ({"text": "\ud83e"}, r"'\\ud83e' is half a character"),
    ({"messages": [user("q"), assistant("a")], "tools": "[}"}, "tools: not valid JSON"),
    ({"messages": [user("q"), assistant("a")], "tools": ["f"]}, "tools is a list of JSON objects"),
    (["q", "a"], "a row is a JSON object, not a list"),
    (None, "not null"),
    (True, "not true or false"),
]


@pytest.mark.parametrize(("value", "words"), BAD)
def test_malformed_rows_say_what_is_wrong(value: Any, words: str, tmp_path: Path) -> None:
    good = {"text": "good"}
    with pytest.raises(InputError, match=f"1 of 2 rows cannot be used: row 2: .*{words}"):
        as_rows([good, value])
    lines = save(tmp_path / "rows.jsonl", f"\n{json.dumps(good)}\n\n{json.dumps(value)}\n")
    with pytest.raises(InputError, match=rf"1 of 2 rows cannot be used: rows\.jsonl:4: .*{words}") as caught:
        load_rows(lines)
    assert "\n" not in str(caught.value)


def test_all_are_counted_and_a_few_are_quoted(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.jsonl", '{"text": "a"}\n' + "nonsense\n" * 3 + '{"text": ""}\n' * 5)
    with pytest.raises(InputError) as caught:
        load_rows(path)
    message = str(caught.value)
    assert "8 of 9 rows" in message
    assert "rows.jsonl:2: not valid JSON: Expecting value at column 1" in message
    assert "rows.jsonl:6: the text is empty" in message
    assert "rows.jsonl:7" not in message
    assert "and 3 more" in message


json_rows = st.lists(
    st.builds(lambda text: {"text": "x" + text}, st.text(max_size=5))
    | st.builds(lambda q, a: {"prompt": q, "completion": a + "."}, st.text(max_size=4), st.text(max_size=4)),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=json_rows, newline=st.sampled_from(["\n", "\r\n"]), bom=st.booleans(), ascii_only=st.booleans())
def test_one_meaning_in_every_file(
    rows: list[dict[str, Any]], newline: str, bom: bool, ascii_only: bool, tmp_path: Path
) -> None:
    """Lines or an array, indented or not, with CRLF or a byte order mark: the same rows, and where they stand."""
    start = "\ufeff" if bom else ""

    def dump(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ascii_only, indent=indent)

    expected = [(row.messages, row.text) for row in as_rows(rows)]
    lines = newline.join(dump(row) for row in rows) + newline
    array = dump(rows, indent=2).replace("\n", newline)
    files = {"rows.jsonl": lines, "lines.json": lines, "array.json": array, "dense.json": dump(rows)}
    for name, text in files.items():
        loaded = load_rows(save(tmp_path / name, start + text))
        assert [(row.messages, row.text) for row in loaded] == expected
        assert [row.meta for row in loaded] == rows
        for row in loaded:
            line = int(row.source.removeprefix(f"{name}:"))
            at = text.split("\n")[line - 1]
            if name == "rows.jsonl":
                assert json.loads(at) == row.meta
            elif name == "array.json":
                assert at.strip() == "{"  # an element of an indented array begins so
    assert [row.source for row in load_rows(tmp_path / "rows.jsonl")] == [
        f"rows.jsonl:{i + 1}" for i in range(len(rows))
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no rows"),
        (" \r\n\n", "holds no rows"),
        ("[]", "holds no rows"),
        ('{\n "text": "a"\n}', r"rows\.json:1: one JSON value over several lines"),
        ('[{"text": "a"},\n {"text": }]', r"rows\.json:2: not valid JSON: Expecting value at column 11"),
        ('[{"text": "a"}]\n{"text": "b"}', r"rows\.json:2: not valid JSON: Extra data"),
        ('[["a"],\n["b"]]', r"2 of 2 .*rows\.json:1: a row is a JSON object, not a list; rows\.json:2"),
        ("[" * 100_000, "nested too deeply"),
        (b'{"text": "caf\xe9"}', "not UTF-8 text .byte 13."),
        ('"just a string"', "a row is a JSON object, not a string"),
    ],
)
def test_files_that_hold_no_rows(content: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        load_rows(save(tmp_path / "rows.json", content))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read: No such file"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder; name its files"):
        load_rows(tmp_path)


def test_line_separators_inside_strings_end_no_line(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x1d"
    rows = load_rows(save(tmp_path / "rows.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n"))
    assert [row.text for row in rows] == [text]
