"""Rows of tables as dicts of JSON values: pyarrow's, datasets', pandas' and those in Parquet files.

A column is a struct with the same keys in every row: Arrow fills what a row does not have with null, also deep inside,
so that a call of {"city": "Rome"} beside one of {"day": 3} comes back as {"city": "Rome", "day": null}, which
nobody wrote. A null in a table is therefore a missing key. Where null has a meaning, Arrow's json type keeps it
(`datasets.Json`), and so does a JSON file.

None of these packages is imported unless there is something of theirs to read.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import date, time
from pathlib import Path
from typing import Any

import numpy as np

from minilora.data.json_values import parse_json
from minilora.errors import InputError

Convert = Callable[[Any], Any]
BATCH = 256  # rows made into Python's objects at a time


def table_rows(value: Any) -> Iterator[Any] | None:
    """The rows of a table in memory, None for anything else; an InputError stands for a row that JSON cannot hold."""
    if _is(value, "datasets", "DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(map(repr, value))
        raise InputError(f"a {type(value).__name__} is several data sets: give one of its splits ({splits})")
    if _is(value, "datasets", "Dataset"):
        return _dataset_rows(value)
    if _is(value, "datasets", "IterableDataset"):
        return (_row((*cell, plain) for cell in row.items()) for row in value.with_format(None))
    if _is(value, "pandas", "DataFrame"):
        return _frame_rows(value)
    if _is(value, "pyarrow", "Table"):
        return _arrow_rows(value.to_batches(BATCH))
    return None


def _is(value: Any, package: str, *classes: str) -> bool:
    """Whether it is of one of a package's classes; who has such a value has imported the package."""
    module = sys.modules.get(package)
    return any(isinstance(value, getattr(module, name, ())) for name in classes)


def parquet_rows(path: Path) -> Iterator[Any]:
    """The rows of a Parquet file, in batches."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: .parquet needs a package more: pip install pyarrow") from error
    if int(pyarrow.__version__.partition(".")[0]) < 15:  # before 14.0.1 a file can have it unpickle (CVE-2023-47248)
        raise InputError(f"{path}: pyarrow {pyarrow.__version__} is not safe to read it: pip install -U pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            yield from _arrow_rows(file.iter_batches(BATCH))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _dataset_rows(dataset: Any) -> Iterator[Any]:
    if dataset.format["type"] == "custom":  # set_transform: the rows are what it makes of the columns
        return (_row((*cell, plain) for cell in row.items()) for row in dataset)
    arrow = dataset.with_format("arrow", columns=dataset.format["columns"])
    return _arrow_rows(arrow.iter(BATCH))


def _frame_rows(frame: Any) -> Iterator[Any]:
    """A cell without a value is NaN, NaT, None or pandas.NA, by its column's type: the row has no such key."""
    missing, is_scalar = sys.modules["pandas"].isna, sys.modules["pandas"].api.types.is_scalar
    _refuse_repeated(frame.columns)
    for cells in frame.itertuples(index=False, name=None):
        pairs = zip(frame.columns, cells, strict=True)
        yield _row((name, cell, plain) for name, cell in pairs if not (is_scalar(cell) and missing(cell)))


def _arrow_rows(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        _refuse_repeated(batch.schema.names)
        convert = {field.name: _of_arrow(field.type) for field in batch.schema}
        try:
            rows = batch.to_pylist()
        except (ValueError, KeyError, OverflowError) as error:  # a key twice in a struct, a year of ten digits
            raise InputError(f"the table has values that are none of Python's: {error}") from error
        for row in rows:
            yield _row((name, value, convert[name]) for name, value in row.items())


def _refuse_repeated(columns: Any) -> None:
    names = list(columns)
    if repeated := sorted({str(name) for name in names if names.count(name) > 1}):
        raise InputError(f"the table has more than one column {', '.join(repeated)}")


def _row(cells: Iterable[tuple[Any, Any, Convert]]) -> dict[Any, Any] | InputError:
    """The row of (column, value, how to convert it)."""
    row = {}
    for name, value, convert in cells:
        try:
            row[name] = None if value is None else convert(value)
        except InputError as error:
            return InputError(f"column {name!r}: {error}")
    return _without_nulls(row)


def _of_arrow(kind: Any) -> Convert:
    """How to convert the values of an Arrow type, which tells a struct, whose keys are filled, from a map."""
    types = sys.modules["pyarrow"].types
    if getattr(kind, "extension_name", "") == "arrow.json":
        return _parsed
    if hasattr(kind, "storage_type"):  # another extension, such as datasets' Array2D
        return _of_arrow(kind.storage_type)
    if types.is_struct(kind):
        fields = {field.name: _of_arrow(field.type) for field in kind}
        return lambda struct: {key: fields[key](value) for key, value in struct.items() if value is not None}
    if types.is_map(kind):
        item = _of_arrow(kind.item_type)
        return lambda pairs: _mapping([(key, None if value is None else item(value)) for key, value in pairs])
    if types.is_nested(kind) and not types.is_union(kind):
        item = _of_arrow(kind.value_type)
        return lambda values: [None if value is None else item(value) for value in values]
    return _leaf


def _mapping(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    if len(mapping := dict(pairs)) < len(pairs):
        raise InputError("a map has a key twice")
    return mapping


def _parsed(text: str) -> Any:
    value = parse_json(text)
    if isinstance(value, InputError):
        raise value
    return value


def plain(value: Any) -> Any:
    """The same of Python's and NumPy's objects, without the nulls of dicts, however deep."""
    if isinstance(value, dict):
        return _without_nulls({key: plain(item) for key, item in value.items()})
    if (isinstance(value, np.ndarray) and value.ndim) or isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return _leaf(value)


def _without_nulls(value: dict[Any, Any]) -> dict[Any, Any]:
    return {key: item for key, item in value.items() if item is not None}


def _leaf(value: Any) -> Any:
    if isinstance(value, np.datetime64):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        value = value.item()
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if value is None or isinstance(value, str | int | float):
        return value
    raise InputError(f"JSON has no form for {type(value).__name__}; leave the column out")
