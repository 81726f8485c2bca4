"""Which rows are taken: by what they say, in exact numbers or for good, whatever their order and their files."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data.mixture import mix_rows, split_rows
from minilora.data.rows import Row, as_rows, load_rows
from minilora.errors import InputError


def texts(n: int, start: int = 0) -> list[Row]:
    return as_rows([{"text": f"row {i}"} for i in range(start, start + n)])


def words(rows: list[Row]) -> list[str]:
    return [row.text or "" for row in rows]


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Mixtures


@settings(deadline=None)
@given(n=st.integers(1, 40), weight=st.floats(0.03, 4), seed=st.integers())
def test_a_weight_is_how_often_rows_are_taken(n: int, weight: float, seed: int) -> None:
    rows, count = texts(n), round(weight * n)
    if count == 0:
        with pytest.raises(InputError, match=f"source 1: with a weight of .* none of its {n} rows is taken"):
            mix_rows([(rows, weight)])
        return
    mixed = mix_rows([(rows, weight)])
    assert len(mixed) == count
    assert all(words(mixed).count(row) in (count // n, count // n + 1) for row in words(rows))
    whole, rest = mixed[: count // n * n], mixed[count // n * n :]
    assert whole == rows * (count // n)
    assert rest == [row for row in rows if row in rest]  # in their order
    shuffled = random.Random(seed).sample(rows, n)
    assert sorted(words(mix_rows([(shuffled, weight)]))) == sorted(words(mixed))
    more = mix_rows([(rows, weight + 0.5)])
    assert all(words(more).count(row) >= words(mixed).count(row) for row in words(rows))


def test_sources_come_one_after_the_other_and_what_is_left_out_is_said(tmp_path: Path, caplog: Any) -> None:
    rows = [{"text": f"row {i}"} for i in range(8)]
    a, b = save(tmp_path / "a.jsonl", rows[:4]), save(tmp_path / "b.jsonl", rows[4:])
    mixed = mix_rows({a: 1, str(b): 0.5})
    assert words(mixed)[:4] == words(texts(4))
    assert len(mixed) == 6 and {row.source.partition(":")[0] for row in mixed[4:]} == {"b.jsonl"}
    assert caplog.messages == [f"{b}: 2 rows of 4, by its weight of 0.5"]
    caplog.clear()
    assert mix_rows([([a, b], 1), (rows[:2], 2.5), (iter(rows), 1)])[:8] == mix_rows({tmp_path / "*.jsonl": 1})
    assert caplog.messages == ["source 2: 5 rows of 2, by its weight of 2.5"]


def test_two_files_of_one_name_are_told_apart_and_one_file_counts_once(tmp_path: Path) -> None:
    a, b = (save(tmp_path / folder / "x.jsonl", [{"text": folder}]) for folder in "ab")
    assert [row.source for row in mix_rows({a: 1, b: 1})] == [f"{a}:1", f"{b}:1"]
    with pytest.raises(InputError, match=r"a/x\.jsonl is named 2 times; to repeat its rows, give it a weight"):
        mix_rows({a: 1, tmp_path / "*/x.jsonl": 0.5})


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), True, "1", None])
def test_a_weight_is_a_number_above_zero(weight: Any) -> None:
    with pytest.raises(InputError, match="source 2: a weight is a number above 0, not"):
        mix_rows([(texts(1), 1), (texts(1), weight)])
    with pytest.raises(InputError, match="a mixture without sources"):
        mix_rows({})
    with pytest.raises(InputError, match="with weights, they go through mix_rows"):
        load_rows({"a.jsonl": 0.5})


# Held-out rows


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(), share=st.floats(0.1, 0.9))
def test_no_repeat_is_on_both_sides_and_no_row_changes_sides(seed: int, share: float) -> None:
    rows = texts(100) * 2
    train, held_out = split_rows(rows, share)
    assert sorted(words(train + held_out)) == sorted(words(rows))
    assert not set(words(train)) & set(words(held_out))
    shuffled = random.Random(seed).sample(rows + texts(50, start=100), 250)
    more_train, more_held_out = split_rows(shuffled, share)
    assert set(words(train)) <= set(words(more_train)) and set(words(held_out)) <= set(words(more_held_out))
    assert train == [row for row in rows if row in train]  # in their order


def test_the_share_is_met_within_chance() -> None:
    """Of 20,000 rows 1,000 ± 5 standard deviations (31) are held out, also of the rows that a mixture has chosen."""
    rows = texts(20_000)
    assert abs(len(split_rows(rows, 0.05)[1]) - 1000) < 5 * 31
    quarter = mix_rows([(rows, 0.25)])
    assert abs(len(split_rows(quarter, 0.25)[1]) - 1250) < 5 * 31


def test_rows_are_the_same_where_they_say_the_same() -> None:
    """Whatever their format, number, source, and nulls."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    same = [
        {"messages": messages, "id": 1},
        {"messages": [{**message, "tool_calls": None} for message in messages], "tools": []},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"prompt": messages[:1], "completion": messages[1:]},
        {"instruction": "q", "output": "a"},
    ]
    for share in (0.2, 0.5, 0.8):
        sides = split_rows([*as_rows(same), *texts(200)], share)
        assert sorted(sum(row.messages is not None for row in side) for side in sides) == [0, len(same)]


@pytest.mark.parametrize("share", [0, 1, -0.1, 5, float("nan"), True, "0.05", None])
def test_a_share_lies_between_0_and_1(share: Any) -> None:
    with pytest.raises(InputError, match=r"a number between 0 and 1, such as 0\.05, not"):
        split_rows(texts(9), share)


def test_an_empty_side_is_an_error() -> None:
    with pytest.raises(InputError, match=r"a share of 0\.001 none of 2 rows is held out: choose another, or eval_data"):
        split_rows(texts(2), 0.001)
    with pytest.raises(InputError, match=r"a share of 0\.999 none of 2 rows is left to train on"):
        split_rows(texts(2), 0.999)
