"""From text to JSON values, each with its line: an array, or JSON Lines, whichever the text begins like.

What is broken becomes an InputError in the value's place, so that whoever reads on can count and quote all of them.
"""

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from minilora.errors import InputError

BETWEEN_ELEMENTS = re.compile(r"[\s,]*")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST = 2**31  # bytes of one line or array: an archive of some kilobytes can unpack to one that fills the memory


def json_values(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The values of an array or of JSON Lines, each with the number of its line."""
    line, number = _line(file).removeprefix(BYTE_ORDER_MARK), 1
    while line.isspace():
        line, number = _line(file), number + 1
    if line.lstrip().startswith(b"["):
        yield from _array(b"\n" * (number - 1) + line + _rest(file))
        return
    if line and isinstance(parse_json(line), InputError):  # a broken line, or the first of a value over several
        rest = _rest(file)
        if not isinstance(parse_json(line + rest), InputError):
            yield number, InputError("one JSON value over several lines; give an array of rows, or one row a line")
            return
        file = io.BytesIO(rest)
    while line:  # up to a line feed: a JSON string may hold the other line separators
        if line.strip():
            yield number, parse_json(line)
        line, number = _line(file), number + 1


def parse_json(text: str | bytes) -> Any:
    """The JSON value, or an InputError that says why there is none."""
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        refusal = InputError(f"not UTF-8 text (byte {error.start}); save it as UTF-8")
    except json.JSONDecodeError as error:
        refusal = InputError(f"not valid JSON: {error.msg} at column {error.colno}")
        refusal.__cause__ = error
    except RecursionError:
        refusal = InputError("not usable JSON: nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        refusal = InputError(f"not usable JSON: {error}")
    return refusal


def _array(content: bytes) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array; a single InputError stands for an array that is broken."""
    array = parse_json(content)
    if isinstance(array, InputError):
        yield getattr(array.__cause__, "lineno", 1), array
        return
    text = content.decode()
    decoder = json.JSONDecoder()
    end = text.index("[") + 1
    line = text.count("\n", 0, end) + 1
    for _ in array:
        start = BETWEEN_ELEMENTS.match(text, end).end()  # type: ignore[union-attr]  # it matches anything
        line += text.count("\n", end, start)
        value, end = decoder.raw_decode(text, start)
        yield line, value
        line += text.count("\n", start, end)


def _line(file: BinaryIO) -> bytes:
    return _of_bearable_length(file.readline(LONGEST + 1))


def _rest(file: BinaryIO) -> bytes:
    return _of_bearable_length(file.read(LONGEST + 1))


def _of_bearable_length(text: bytes) -> bytes:
    if len(text) > LONGEST:
        raise InputError(f"a line or an array of more than {LONGEST:,} bytes; write one row a line")
    return text
