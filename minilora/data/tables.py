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

BATCH = 256  # rows made into Python's objects at a time


def table_rows(value: Any) -> Iterator[Any] | None:
    """The rows of a table in memory, None for anything else; an InputError stands for a row that JSON cannot hold."""
    if _is(value, "datasets", "DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(map(repr, value))
        raise InputError(f"a {type(value).__name__} is several data sets: give one of its splits ({splits})")
    if _is(value, "datasets", "Dataset"):
        return _dataset_rows(value)
    if _is(value, "datasets", "IterableDataset"):
        return (_row(row.items(), plain) for row in value.with_format(None))
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
        return (_row(row.items(), plain) for row in dataset)
    arrow = dataset.with_format("arrow", columns=dataset.format["columns"])
    return _arrow_rows(arrow.iter(BATCH))


def _frame_rows(frame: Any) -> Iterator[Any]:
    """A cell without a value is NaN, NaT, None or pandas.NA, by its column's type: the row has no such key."""
    missing, is_scalar = sys.modules["pandas"].isna, sys.modules["pandas"].api.types.is_scalar
    _refuse_repeated(frame.columns)
    for cells in frame.itertuples(index=False, name=None):
        pairs = zip(frame.columns, cells, strict=True)
        yield _row([(name, cell) for name, cell in pairs if not (is_scalar(cell) and missing(cell))], plain)


def _arrow_rows(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        _refuse_repeated(batch.schema.names)
        types = dict(zip(batch.schema.names, batch.schema.types, strict=True))
        try:
            rows = batch.to_pylist(maps_as_pydicts="strict")
        except (ValueError, KeyError, OverflowError) as error:  # a key twice in a struct, the year 285 billion
            raise InputError(f"the table has values that are none of Python's: {error}") from error
        for row in rows:
            yield _row([(name, (value, types[name])) for name, value in row.items()], lambda pair: _of_arrow(*pair))


def _refuse_repeated(columns: Any) -> None:
    names = list(columns)
    if repeated := sorted({str(name) for name in names if names.count(name) > 1}):
        raise InputError(f"the table has more than one column {', '.join(repeated)}")


def _row(cells: Iterable[tuple[Any, Any]], convert: Callable[[Any], Any]) -> dict[Any, Any] | InputError:
    row = {}
    for name, cell in cells:
        try:
            row[name] = convert(cell)
        except InputError as error:
            return InputError(f"column {name!r}: {error}")
    return _without_nulls(row)


def _of_arrow(value: Any, kind: Any) -> Any:
    """The value of an Arrow type, which says what a dict is: a struct with filled keys, or a map with its own."""
    pyarrow = sys.modules["pyarrow"]
    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        parsed = parse_json(value)
        if isinstance(parsed, InputError):
            raise parsed
        return parsed
    if isinstance(kind, pyarrow.BaseExtensionType):  # such as datasets' Array2D
        return _of_arrow(value, kind.storage_type)
    if pyarrow.types.is_struct(kind):
        return _without_nulls({field.name: _of_arrow(value[field.name], field.type) for field in kind})
    if pyarrow.types.is_map(kind):
        return {key: _of_arrow(item, kind.item_type) for key, item in value.items()}
    if isinstance(value, list):
        return [_of_arrow(item, kind.value_type) for item in value]
    return _leaf(value)


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
