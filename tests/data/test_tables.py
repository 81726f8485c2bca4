"""Tables of pyarrow, datasets and pandas, in memory and in Parquet files: their rows are those of a JSON file."""

import datetime
import decimal
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
from helpers.chat import assistant, user
from helpers.rows import rows_of_any_format, said
from hypothesis import HealthCheck, given, settings
from pyarrow import parquet

from minilora.data.rows import as_rows, given_rows, load_rows
from minilora.data.tables import BATCH, table_rows
from minilora.errors import InputError


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"messages": [user("q"), {"role": "assistant", "tool_calls": [{"function": function}]}]}


def arrow(rows: list[Any]) -> pyarrow.Table:
    names = {name: None for row in rows for name in row}  # of every row: from_pylist would take the first one's alone
    return pyarrow.table({name: [row.get(name) for row in rows] for name in names})


def tables_of(rows: list[Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """The same rows in everything that holds tables, as these packages themselves make and write it."""
    table, files = arrow(rows), {name: folder / f"{name}.parquet" for name in ("pyarrow", "datasets", "pandas")}
    dataset, frame = datasets.Dataset(table), pandas.DataFrame(rows)
    yield from {"Table": table, "Dataset": dataset, "stream": dataset.to_iterable_dataset(), "frame": frame}.items()
    parquet.write_table(table, files["pyarrow"], row_group_size=2)
    dataset.to_parquet(files["datasets"])
    frame.to_parquet(files["pandas"])
    yield from files.items()
    yield "frame of a file", pandas.read_parquet(files["pandas"])
    yield "frame of pyarrow", pandas.read_parquet(files["pandas"], dtype_backend="pyarrow")
    yield "dataset of a file", datasets.Dataset.from_parquet(str(files["pyarrow"]), cache_dir=str(folder))
    yield "generator", (row for row in rows)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_of_any_format)
def test_one_meaning_in_every_table(rows: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    expected = said(as_rows(rows))
    datasets.disable_progress_bars()
    for name, table in tables_of(rows, tmp_path_factory.mktemp("tables")):
        got = given_rows(table, "training")
        assert said(got) == expected, name
        assert [row.meta for row in got] == rows, name
        source = f"{table.name}:" if isinstance(table, Path) else "row "
        assert [row.source for row in got] == [f"{source}{i}" for i in range(1, len(rows) + 1)]


def test_null_is_a_missing_key_however_deep() -> None:
    """One column holds both calls, and so both their keys in each row: nobody wrote {"city": null}."""
    rows = [call(city="Rome"), call(days=3, near=False), call(places=[{"x": 1}, {"y": 0}])]
    table = arrow(rows)
    assert "None" in str(table.to_pylist()[0])
    assert list(table_rows(table) or []) == rows
    assert list(table_rows(datasets.Dataset(table)) or []) == rows
    assert list(table_rows(table.to_pandas()) or []) == rows


def test_null_that_arrow_keeps_as_json_is_kept(tmp_path: Path) -> None:
    rows = [call(unit=None, days=3), call(days="three")]  # of two types: datasets holds them as JSON
    dataset = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    dataset.to_parquet(tmp_path / "rows.parquet")
    assert [row.meta for row in load_rows(tmp_path / "rows.parquet")] == rows
    assert list(table_rows(dataset) or []) == rows
    broken = pyarrow.table({"text": pyarrow.array(['"a"', "[1,"], pyarrow.json_())})
    with pytest.raises(InputError, match=r"1 of 2 .*row 2: column 'text': not valid JSON"):
        given_rows(broken, "training")


def test_a_dataset_is_read_as_it_is_chosen_formatted_and_transformed() -> None:
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "n": [1, 2, 3]})
    expected = [{"text": "c", "n": 3}, {"text": "a", "n": 1}]
    chosen = dataset.select([2, 0])
    for form in (None, "numpy", "torch", "pandas", "arrow"):
        assert list(table_rows(chosen.with_format(form)) or []) == expected
        assert list(table_rows(chosen.to_iterable_dataset().with_format(form)) or []) == expected
    assert list(table_rows(chosen.with_format("numpy", columns=["text"])) or []) == [{"text": "c"}, {"text": "a"}]
    transformed = chosen.with_transform(lambda batch: {"text": batch["text"], "n": np.array(batch["n"]) * 2})
    assert list(table_rows(transformed) or []) == [{"text": "c", "n": 6}, {"text": "a", "n": 2}]
    long = datasets.Dataset.from_dict({"text": [str(i) for i in range(2 * BATCH + 1)]}).shuffle(seed=0)
    assert [row.text for row in given_rows(long, "training")] == list(long["text"])


def test_a_frame_s_missing_cells_and_numpy_s_values() -> None:
    nested = {"a": np.float32(1.5), "n": None, "l": np.array([{"z": None, "y": np.int64(1)}], dtype=object)}
    frame = pandas.DataFrame(
        {
            "text": ["t", "u", "v", "w"],
            "any": [np.array([1, 2]), nested, float("nan"), pandas.NA],
            "day": pandas.to_datetime(["2020-01-01", None, "2021-01-02", None]),
            "number": pandas.array([1, None, 3, None], dtype="Int64"),
            "kind": pandas.Categorical(["x", None, "y", None]),
        },
        index=[7, 7, 8, 9],
    )
    assert list(table_rows(frame) or []) == [
        {"text": "t", "any": [1, 2], "day": "2020-01-01T00:00:00", "number": 1, "kind": "x"},
        {"text": "u", "any": {"a": 1.5, "l": [{"y": 1}]}},
        {"text": "v", "day": "2021-01-02T00:00:00", "number": 3, "kind": "y"},
        {"text": "w"},
    ]
    json.dumps([row.meta for row in given_rows(frame, "training")])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (pyarrow.array([datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.UTC)]), "2020-01-02T03:00:00+00:00"),
        (pyarrow.array([datetime.date(2020, 1, 2)]), "2020-01-02"),
        (pyarrow.array(["a"]).dictionary_encode(), "a"),
        (pyarrow.array([["a"]], pyarrow.list_view(pyarrow.string_view())), ["a"]),
        (pyarrow.array([[("a", 1), ("b", None)]], pyarrow.map_(pyarrow.string(), pyarrow.int8())), {"a": 1, "b": None}),
        (pyarrow.array([{"a": None}]), {}),
        (pyarrow.array([[1, None]]), [1, None]),
    ],
)
def test_arrow_s_types(column: pyarrow.Array, value: Any) -> None:
    assert list(table_rows(pyarrow.table({"text": ["t"], "v": column})) or []) == [{"text": "t", "v": value}]


def test_what_json_has_no_form_for_is_named(tmp_path: Path) -> None:
    for value in (b"image", datetime.timedelta(1), decimal.Decimal("1.5")):
        words = rf"(?i)1 of 2 .*2: column 'v': JSON has no form for {type(value).__name__}; leave the column out"
        table = pyarrow.table({"text": ["t", "t"], "v": [None, value]})
        parquet.write_table(table, tmp_path / "rows.parquet")
        for rows in (table, pandas.DataFrame({"text": ["t", "t"], "v": [None, value]}), tmp_path / "rows.parquet"):
            with pytest.raises(InputError, match=words):
                given_rows(rows, "training")


def test_a_pyarrow_that_unpickles_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(arrow([{"text": "a"}]), tmp_path / "a.parquet")
    monkeypatch.setattr(pyarrow, "__version__", "13.0.0")
    with pytest.raises(InputError, match=r"pyarrow 13\.0\.0 is not safe to read it: pip install -U pyarrow"):
        load_rows(tmp_path / "a.parquet")


DATASET = datasets.Dataset.from_dict({"text": ["a"]})
MAP = pyarrow.array([[("a", 1), ("a", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int8()))
TWICE = pyarrow.StructArray.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (datasets.DatasetDict(train=DATASET, test=DATASET), r"DatasetDict is .* one of its splits \('train', 'test'\)"),
        (datasets.IterableDatasetDict(train=DATASET.to_iterable_dataset()), r"one of its splits \('train'\)"),
        (pyarrow.table([[1], [2]], names=["a", "a"]), "more than one column a"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "more than one column a"),
        (pyarrow.table({"v": TWICE}), "values that are none of Python's: .*duplicate field names"),
        (pyarrow.table({"v": MAP}), "row 1: column 'v': a map has a key twice"),
        (DATASET.select([]), "there are no training rows"),
        (pandas.DataFrame({"question": ["q"]}), "row 1: its keys are 'question'; a row has"),
        (DATASET["text"], "must be a path, or all dicts or all Rows|cannot be read"),
        ({"prompt": "q", "completion": "a"}, "a list of dicts, not one dict; files with weights go through mix_rows"),
        ([assistant("a"), "a.jsonl"], "a path, or all dicts or all Rows, not dict and str"),
    ],
)
def test_what_is_no_table_of_rows_is_named(rows: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        given_rows(rows, "training")
