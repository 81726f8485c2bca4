"""The parity matrix: every variant on every kind of layer in every dtype, beside the installed PEFT and float64.

python tests/test_parity.py --write writes docs/parity.md from what runs.
"""

import re
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers.parity import HALF, Cell
from helpers.parity_cells import (
    AGAINST_PEFT,
    CELLS,
    CRASHES,
    FLOAT32,
    FOLLOWS_PEFT,
    KNOWN,
    SILENT,
    crash,
    follows_peft,
    known_reason,
    result_of,
    used,
    wrong,
)
from helpers.parity_table import document, ratios

DOCUMENT = Path(__file__).parents[1] / "docs" / "parity.md"

# What PEFT has to say of padding, tied weights, merges into 4 bits and its own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

SAYS_WHY = ("ValueError: ", "TypeError: ", "NotImplementedError")


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell) -> None:
    result = result_of(cell)
    mine, theirs = result.errors.get("minilora"), result.errors.get("PEFT")
    for why in result.refusals.get("minilora", {}).values():
        assert why.startswith("InputError: "), why
    if (why := result.refusals.get("PEFT", {}).get("all")) and mine is not None:
        assert crash(cell) or why.startswith(SAYS_WHY), f"PEFT fails, and nothing here says why: {why}"
    if follows_peft(cell):
        assert not wrong({q: d for q, d in result.difference.items() if q != "start"}, cell.dtype), result.difference
        return
    assert not wrong(mine or {}, cell.dtype), mine
    for quantity in wrong(theirs or {}, cell.dtype):
        assert known_reason(cell, quantity), f"PEFT's {quantity} is off by {theirs}: find out why"
    if cell.dtype not in HALF and result.difference.get("start", 0.0) > FLOAT32["start"]:
        assert known_reason(cell, "start"), result.difference
    for quantity, ratio in ratios(cell, AGAINST_PEFT).items() if cell.dtype in HALF else ():
        assert ratio < AGAINST_PEFT[quantity], (quantity, ratio, mine, theirs)


@pytest.mark.parametrize("cell", [c for c in CELLS if c.variant.name == "LoRA-GA" and c.layers == "Linear"], ids=str)
def test_randomized_starts_are_near(cell: Cell) -> None:
    # Four power iterations leave of the error of a random subspace what (next singular value / this one)^9 leaves.
    assert result_of(cell).difference.get("start", 0.0) < 1e-2


def test_every_known_difference_is_one() -> None:
    document()
    for patterns in [*KNOWN, *CRASHES, *SILENT, *FOLLOWS_PEFT]:
        assert patterns in used, f"{patterns}: PEFT has changed, or another line comes before: take it out"


def cells_of(text: str) -> Iterator[list[str]]:
    """The tables' rows, without the numbers of the remarks."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [re.sub("[ ⁰¹²³⁴⁵⁶⁷⁸⁹]+$", "", part.strip()) for part in re.split(r"[|/]", line)]


def close(a: str, b: str) -> bool:
    """The same words, or numbers within a factor of ten; of what is below 1e-6, or 0.1, one is as good as the other."""
    numbers = re.compile(r"\d+(\.\d+)?(e-?\d+)?")
    if not numbers.fullmatch(a) or not numbers.fullmatch(b):
        return a == b
    floor = 0.1 if "." in a + b else 1e-6
    return 0.09 < max(float(a), floor) / max(float(b), floor) < 11


def test_the_document_says_what_runs() -> None:
    written = DOCUMENT.read_text(encoding="utf-8")
    if f"peft {version('peft')}," not in written:
        pytest.skip(f"docs/parity.md was not written with the installed peft {version('peft')}")
    if torch.cuda.is_available():
        pytest.skip("docs/parity.md was written without CUDA, which PEFT's LoftQ needs")
    rows, live = list(cells_of(written)), list(cells_of(document()))
    assert len(rows) == len(live)
    for row, now in zip(rows, live, strict=True):
        assert len(row) == len(now), (row, now)
        for a, b in zip(row, now, strict=True):
            assert close(a, b), f"python tests/test_parity.py --write: {row[1]}: {a} is now {b}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_parity.py --write writes docs/parity.md")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    DOCUMENT.write_text(document(), encoding="utf-8")
