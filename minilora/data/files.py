"""From the names of files to JSON values, each with the file and the line that it comes from.

    .json .jsonl     an array, or a value a line: the content decides, whatever the name
    .csv .tsv        a record is an object, the first line names its keys; all values are strings
    .parquet         a row is an object (tables.py); its number stands for the line
    .gz .zst         after one of the first four, as in .jsonl.gz (archives.py)

A file is read piece by piece, and one that is damaged or cut off is an error: nobody would miss the rows that it lost.
"""

import csv
import glob
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from minilora.data import archives
from minilora.data.json_values import json_values
from minilora.data.tables import parquet_rows
from minilora.errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".json", ".jsonl", ".ndjson", *DELIMITERS, ".parquet", *archives.SUFFIXES)


def find_files(names: Iterable[str | Path]) -> dict[Path, str]:
    """The files that names and patterns such as `data/*.jsonl` stand for, with what the sources of rows call each.

    A pattern's files come sorted. Two files of one name are told apart by their paths.

    Raises InputError where a pattern fits none, for a folder, and where a file comes twice: its rows would count twice.
    """
    paths = [path for name in names for path in _matching(name)]
    for path, times in Counter(path.resolve() for path in paths).items():
        if times > 1:
            raise InputError(f"{path} is named {times} times; to repeat its rows, give it a weight")
    shared = Counter(path.name for path in paths)
    return {path: path.name if shared[path.name] == 1 else str(path) for path in paths}


def _matching(name: str | Path) -> list[Path]:
    path = Path(name)
    try:
        is_there, is_folder = path.exists(), path.is_dir()
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    if is_folder:
        raise InputError(f"{name} is a folder; name its files, such as '{name}/*.jsonl'")
    if is_there:
        return [path]
    if not glob.has_magic(str(name)):
        raise InputError(f"{name}: cannot be read: No such file")
    matches = glob.glob(str(name), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute patterns
    if found := sorted(match for match in map(Path, matches) if match.is_file()):
        return found
    raise InputError(f"no file fits {name}")


def read_files(files: Mapping[Path, str]) -> Iterator[tuple[str, Any]]:
    """(source, JSON value) of every row; an InputError stands for a value that cannot be read.

    Raises InputError for a file that cannot be read at all, or holds no rows.
    """
    for path, label in files.items():
        empty = True
        for line, value in _values(path):
            yield f"{label}:{line}", value
            empty = False
        if empty:
            raise InputError(f"{path}: holds no rows")


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    archived = path.suffix.lower() in archives.SUFFIXES
    kind = (Path(path.stem) if archived else path).suffix.lower()
    if kind == ".parquet":
        if archived:
            raise InputError(f"{path}: Parquet is compressed in itself; unpack the file")
        yield from enumerate(parquet_rows(path), start=1)
        return
    with archives.open_unpacked(path) as file:
        try:
            yield from _records(file, DELIMITERS[kind]) if kind in DELIMITERS else json_values(file)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def _records(file: BinaryIO, delimiter: str) -> Iterator[tuple[int, Any]]:
    """The records of CSV, each with the line on which it begins; the first one broken is the last."""
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    start, columns = 1, None
    try:
        for cells in reader:
            if columns is None:
                columns = cells
                if len(set(columns)) < len(columns):
                    raise InputError(f"the first line names a column twice: {', '.join(columns)}")
            elif len(cells) == len(columns):
                yield start, dict(zip(columns, cells, strict=True))
            elif cells:  # an empty line has none
                yield start, InputError(f"{len(cells)} cells under {len(columns)} columns")
            start = reader.line_num + 1
    except csv.Error as error:
        yield start, InputError(f"not valid CSV: {error}; JSON Lines has no such limits")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason}); save it as UTF-8") from error
