"""Which rows of a data set are taken: a share of it in a mixture, and those held out.

Both are chosen by the hash of what a row says. So the choice is the same on every machine and in every order of the
rows, exact repeats are chosen together, and a row that is added moves no other between training and held-out.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from minilora.data.files import find_files, read_files
from minilora.data.rows import Row, Rows, Skipped, collect, given_rows
from minilora.data.tables import plain
from minilora.errors import InputError

logger = logging.getLogger("minilora")


def mix_rows(
    sources: Mapping[str | Path, float] | Sequence[tuple[Rows, float]], skipped: list[Skipped] | None = None
) -> list[Row]:
    """Put the rows of several sources together, each source by its weight.

    A source of n rows with weight w gives round(w · n) rows: all of its rows as often as that allows, and the rest
    once more. With 0.25 a quarter of the rows is taken; with 2.5 all are taken twice, and half of them a third time.
    Which ones is chosen by what they say, whatever their order, and those of a smaller weight are among those of a
    larger one. What that comes to is logged.

    Args:
        sources: a dict from the names of files, or patterns of them, to weights above 0; or a list of (rows, weight),
            the rows in any form that `train` takes.
        skipped: a list that rows which cannot be used are put into; None makes them an error.

    Returns:
        The rows, source after source, each in its own order: training shuffles them.

    Raises:
        InputError: a weight is not a number above 0, or so small that no row is taken, a file comes twice, or as
            `load_rows` does.
    """
    pairs: list[tuple[Rows, float]] = list(sources.items() if isinstance(sources, Mapping) else sources)
    if not pairs:
        raise InputError("a mixture without sources: give files and their weights")
    named = [str(of) if isinstance(of, str | Path) else f"source {i}" for i, (of, _) in enumerate(pairs, start=1)]
    for name, (_, weight) in zip(named, pairs, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise InputError(f"{name}: a weight is a number above 0, not {weight!r}")
    # All files together: two of one name are told apart, and one that two patterns fit is found out.
    files = find_files(source for source, _ in pairs if isinstance(source, str | Path))
    return [
        row
        for name, (source, weight) in zip(named, pairs, strict=True)
        for row in _weighted(_rows_of(source, files, skipped), weight, name)
    ]


def split_rows(rows: Rows, share: float) -> tuple[list[Row], list[Row]]:
    """Hold out a share of the rows, chosen by what they say.

    Each row is held out or not by the hash of its messages, text and tools alone: exact repeats are on the same side,
    and no row changes sides when others are added or their order changes. So the share is met roughly, not exactly.

    Args:
        rows: in any form that `train` takes.
        share: of the rows to hold out, between 0 and 1.

    Returns:
        The rows to train on and those held out, each in their order.

    Raises:
        InputError: the share is not between 0 and 1, one of the sides would be empty, or as `load_rows` does.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise InputError(f"the share to hold out is a number between 0 and 1, such as 0.05, not {share!r}")
    given = given_rows(rows, "training")
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in given:
        sides[_chance(row, "split") < share].append(row)
    if not all(sides):
        side = "held out" if sides[0] else "left to train on"
        raise InputError(f"with a share of {share} none of {len(given)} rows is {side}: choose another, or eval_data")
    return sides


def _rows_of(source: Rows, files: Mapping[Path, str], skipped: list[Skipped] | None) -> list[Row]:
    if isinstance(source, str | Path):
        return collect(read_files({path: files[path] for path in find_files([source])}), skipped)
    return given_rows(source, "training", skipped)


def _weighted(rows: list[Row], weight: float, name: str) -> list[Row]:
    times, rest = divmod(round(weight * len(rows)), len(rows))
    if times + rest == 0:
        raise InputError(f"{name}: with a weight of {weight} none of its {len(rows)} rows is taken")
    order = sorted(range(len(rows)), key=lambda i: _chance(rows[i], "mixture")) if rest else []
    taken = rows * times + [rows[i] for i in sorted(order[:rest])]
    if len(taken) != len(rows):
        logger.warning(f"{name}: {len(taken):,} rows of {len(rows):,}, by its weight of {weight}")
    return taken


def _chance(row: Row, purpose: str) -> float:
    """A number from 0 to 1 that hangs on what the row says alone; another one for each purpose.

    Were they the same, a mixture's quarter would be the rows that a split of a quarter holds out.
    """
    said = plain({"messages": row.messages, "text": row.text, "tools": row.tools})
    content = json.dumps([purpose, said], sort_keys=True)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8]) / 2**64
