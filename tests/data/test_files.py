"""Files of rows: whatever holds them, the rows are the same and say where they come from; nothing is half read."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas
import pytest
import zstandard
from helpers.rows import pairs, rows_of_any_format, said
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora.data import json_values
from minilora.data.rows import as_rows, load_rows
from minilora.errors import InputError

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3)]


def save(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zst(*parts: bytes) -> bytes:
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


FILES: dict[str, Callable[[list[Any]], bytes]] = {
    "rows.jsonl": lines,
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "rows": lines,
    "rows.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "ROWS.JSON.GZ": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "members.jsonl.gz": lambda rows: gzip.compress(lines(rows[:1])) + gzip.compress(lines(rows[1:])),
    "rows.jsonl.zst": lambda rows: zst(lines(rows)),
    "frames.jsonl.zst": lambda rows: zst(lines(rows[:1]), lines(rows[1:])),  # as parallel writers make them
}


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_of_any_format)
def test_one_meaning_in_every_file(rows: list[Any], tmp_path: Path) -> None:
    expected = said(as_rows(rows))
    for name, content in FILES.items():
        loaded = load_rows(save(tmp_path / name, content(rows)))
        assert said(loaded) == expected, name
        assert [row.meta for row in loaded] == rows
        if "jsonl" in name:
            assert [row.source for row in loaded] == [f"{name}:{i}" for i in range(1, len(rows) + 1)]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(pairs, min_size=1, max_size=4), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
def test_csv_is_read_as_csv_and_pandas_write_it(rows: list[Any], end: str, bom: bool, tmp_path: Path) -> None:
    for name, delimiter in {"rows.csv": ",", "rows.tsv": "\t", "rows.csv.gz": ","}.items():
        text = io.StringIO()
        writer = csv.DictWriter(
            text, ["prompt", "completion"], delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL
        )
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode("utf-8-sig" if bom else "utf-8")
        loaded = load_rows(save(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content))
        assert [row.meta for row in loaded] == rows
    if "\\r" not in json.dumps(rows):  # where lines end in \n, it writes a lone \r without quotes, as Python's csv does
        pandas.DataFrame(rows).to_csv(tmp_path / "pandas.csv", index=False, lineterminator=end)
        assert [row.meta for row in load_rows(tmp_path / "pandas.csv")] == rows


def test_a_record_of_csv_says_the_line_on_which_it_begins(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.csv", 'text,id\n"a\nb",1\n\n"c",2\n')
    assert [(row.text, row.source) for row in load_rows(path)] == [("a\nb", "rows.csv:2"), ("c", "rows.csv:5")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.csv",
            "text,id\na\nb,1,2\nc,3\n",
            r"2 of 3 .* a\.csv:2: 1 cells under 2 columns; a\.csv:3: 3 cells",
        ),
        ("a.csv", "text,text\na,b\n", r"a\.csv: the first line names a column twice: text, text"),
        ("a.csv", 'text\n"a"b\n', r"a\.csv:2: not valid CSV"),
        ("a.csv", f"text\n{'a' * 200_000}\n", r"a\.csv:2: not valid CSV: field larger .*JSON Lines has no such limit"),
        ("a.csv", b"text\ncaf\xe9\n", r"a\.csv: not UTF-8 text"),
        ("a.csv", "text\n", r"a\.csv: holds no rows"),
        ("a.csv", "", r"a\.csv: holds no rows"),
        ("a.csv", "prompt;completion\nq;a\n", r"its keys are 'prompt;completion'"),
        ("a.jsonl.gz", lines(ROWS), r"a\.jsonl\.gz: a damaged archive, or none"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-9], r"a\.jsonl\.gz: ends in the middle of the archive"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS)) + b"garbage", r"a\.jsonl\.gz: a damaged archive"),
        ("a.jsonl.zst", lines(ROWS), r"a\.jsonl\.zst: a damaged archive, or none"),
        ("a.jsonl.zst", zst(lines(ROWS))[:-3], r"a\.jsonl\.zst: ends in the middle of the archive"),
        ("a.jsonl.zst", zst(lines(ROWS), lines(ROWS))[:-3], r"a\.jsonl\.zst: ends in the middle of the archive"),
        ("a.jsonl.zst", b"", r"a\.jsonl\.zst: holds no rows"),
        ("a.parquet.gz", b"", r"a\.parquet\.gz: Parquet is compressed in itself"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read as Parquet"),
        ("a.jsonl", '{"text": "a"}\n{"text": ' + "1" * 5000 + "}", r"1 of 2 .*a\.jsonl:2: not usable JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"1 of 2 .*a\.jsonl:2: not UTF-8 text .byte 10."),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(name: str, content: bytes | str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_rows(save(tmp_path / name, content))
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".gz", ".zst"]))
def test_a_part_of_an_archive_is_never_taken_for_the_whole(data: st.DataObject, suffix: str, tmp_path: Path) -> None:
    content = lines([{"text": f"{i} {i * i * 7919}"} for i in range(50)])
    packed = gzip.compress(content) if suffix == ".gz" else zst(content)
    cut = data.draw(st.integers(1, len(packed) - 1))
    with pytest.raises(InputError, match=r"ends in the middle of the archive|a damaged archive"):
        load_rows(save(tmp_path / f"rows.jsonl{suffix}", packed[:cut]))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["rows.csv", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"]))
def test_whatever_is_damaged_the_error_is_of_bad_input(data: st.DataObject, name: str, tmp_path: Path) -> None:
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "rows.parquet")
    pandas.DataFrame(ROWS).to_csv(tmp_path / "rows.csv", index=False)
    contents = {"rows.jsonl.gz": gzip.compress(lines(ROWS)), "rows.jsonl.zst": zst(lines(ROWS))}
    content = bytearray(contents.get(name) or (tmp_path / name).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    with suppress(InputError):
        load_rows(save(tmp_path / name, bytes(content)))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("content", [b" " * 2**22, b"[" + b" " * 2**22, b'{"text": "a"}\n"' + b"x" * 2**22])
def test_an_archive_that_would_fill_the_memory_is_refused(
    suffix: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_values, "LONGEST", 2**20)
    packed = gzip.compress(content) if suffix == ".gz" else zst(content)
    assert len(packed) < 2**13
    with pytest.raises(InputError, match=r"rows\.jsonl\S*: a line or an array of more than 1,048,576 bytes"):
        load_rows(save(tmp_path / f"rows.jsonl{suffix}", packed))


def test_several_files_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["b/2.jsonl", "b/10.jsonl", "a.jsonl", "b/a.jsonl", "[x].jsonl"]):
        save(Path(name), lines([{"text": str(i)}]))
    Path("b/more.jsonl").mkdir()

    def read(*names: str | Path) -> list[tuple[str | None, str]]:
        return [(row.text, row.source) for row in load_rows(names)]

    assert read("b/2.jsonl", Path("a.jsonl")) == [("0", "2.jsonl:1"), ("2", "a.jsonl:1")]
    assert read("b/[0-9]*.jsonl") == [("1", "10.jsonl:1"), ("0", "2.jsonl:1")]  # sorted as names are
    assert read("a.jsonl", "b/a.jsonl") == [("2", "a.jsonl:1"), ("3", "b/a.jsonl:1")]  # told apart
    assert read("**/a.jsonl") == [("2", "a.jsonl:1"), ("3", "b/a.jsonl:1")]
    assert read("[x].jsonl") == [("4", "[x].jsonl:1")]  # a file of that very name
    assert [row.text for row in load_rows(str(tmp_path / "b/*.jsonl"))] == ["1", "0", "3"]
    for names, words in {
        ("a.jsonl", "no*.jsonl"): r"^no file fits no\*\.jsonl$",
        ("b",): r"^b is a folder; name its files, such as 'b/\*\.jsonl'$",
        ("b/a.jsonl", "b/*"): r"b/a\.jsonl is named 2 times",
        ("a.jsonl", "no.jsonl"): r"^no\.jsonl: cannot be read: No such file",
        ("a.jsonl", "x" * 300): r"^x+: cannot be read: File name too long",
        ("a.jsonl", "a\0b"): r"cannot be read: No such file",
    }.items():
        with pytest.raises(InputError, match=words):
            load_rows(names)


@pytest.mark.parametrize(("package", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")])
def test_a_package_that_is_missing_is_named(package: str, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"a\.\S+: \S+ needs a package more: pip install {package}"):
        load_rows(save(tmp_path / name, b""))


def test_reading_json_imports_no_package_of_tables(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.jsonl.gz", gzip.compress(lines(ROWS)))
    program = f"""
import sys
sys.modules |= dict.fromkeys(["pandas", "pyarrow", "datasets", "zstandard"])
import minilora
from minilora.data import given_rows
assert len(minilora.load_rows({str(path)!r})) == len(given_rows(iter({ROWS!r}), "training")) == 3
"""
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
