"""Reading rows: every format means what it says, and no malformed row goes unnamed."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.chat import CALL, TOOL_CONVERSATION, TOOLS, assistant, system, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora.data.rows import as_rows, load_rows
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
    ({"messages": [user("q")]}, "there is no answer: the last message is the user's"),
    ({"messages": []}, "no messages"),
    ({"messages": [user("q"), assistant("a") | {"weight": 0}]}, "message 2 has a weight"),
    ({"instruction": "q", "output": "a", "history": [["p"]]}, "history is a list of"),
    ({"messages": "q"}, "messages is a list, not a string"),
    ({"messages": ["q"]}, "message 1 is a JSON object, not a string"),
    ({"messages": [user("q"), assistant(" \n")]}, "message 2, an answer, is empty"),
    ({"messages": [user("q"), {"role": "assistant"}]}, "content of message 2 is missing"),
    ({"messages": [user("q"), assistant(3)]}, "content of message 2 is a string, not a number"),
    ({"messages": [user("q"), assistant(["a"])]}, "content of message 2 is a string, not a list"),
    (
        {"messages": [assistant("a"), user("q"), assistant("a")]},
        "message 1 is the assistant's, which cannot come first",
    ),
    ({"messages": [user("q"), user("q"), assistant("a")]}, "message 2 is the user's, .* after the user's"),
    ({"messages": [user("q"), assistant("a"), assistant("a")]}, "message 3 is the assistant's"),
    ({"messages": [user("q"), system("s"), assistant("a")]}, "message 2 is the system's"),
    ({"messages": [user("q"), {"role": "robot", "content": "a"}]}, "role 'robot'; known are system, user"),
    ({"messages": [user("q"), {"role": ["x"], "content": "a"}]}, r"role \['x'\]"),
    ({"messages": [user("q"), {"content": "a"}]}, "role None"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]}, "content of message 2 is missing"),
    ({"conversations": [{"from": "alien", "value": "q"}]}, "role 'alien'"),
    ({"instruction": "q"}, "output is missing"),
    ({"instruction": "q", "output": ""}, "an answer, is empty"),
    ({"instruction": 5, "output": "a"}, "instruction is a string, not a number"),
    ({"instruction": "q", "input": ["i"], "output": "a"}, "input is a string, not a list"),
    ({"prompt": "q"}, "completion is missing"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "completion is missing"),
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
