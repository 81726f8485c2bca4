"""The rows of `minilora train`: read, mixed, held out and capped, and a line for whatever is left out."""

import logging

import minilora as ml
from minilora.data import Row, Skipped, quoted
from minilora.errors import InputError

logger = logging.getLogger("minilora")


def rows_of_a_run(
    data: dict[str, float] | str | list[str],
    eval_data: str | list[str] | None,
    split: float | None,
    max_rows: int | None,
    skip_bad_rows: bool = False,
) -> tuple[list[Row], list[Row] | None]:
    """The rows to train on and the held-out ones: of the mixture a part is held out, and of the rest the first taken.

    Raises InputError for rows or settings that cannot be used.
    """
    if split is not None and eval_data:
        raise InputError("split and eval_data both say which rows are held out: choose one of them")
    if max_rows is not None and max_rows < 1:
        raise InputError(f"max_rows must be at least 1, not {max_rows}")
    skipped: list[Skipped] | None = [] if skip_bad_rows else None
    rows = ml.mix_rows([*data.items()], skipped) if isinstance(data, dict) else ml.load_rows(data, skipped)
    eval_rows = ml.load_rows(eval_data, skipped) if eval_data else None
    if skipped:
        logger.warning(f"{len(skipped):,} rows cannot be used and are left out ({quoted(skipped, 3)})")
    if split is not None:
        rows, eval_rows = ml.split_rows(rows, split)
        logger.warning(f"split={split}: {len(eval_rows):,} rows are held out, {len(rows):,} are left to train on")
    if max_rows is not None and len(rows) > max_rows:
        logger.warning(f"max_rows={max_rows}: the first {max_rows:,} of {len(rows):,} rows are trained on")
        rows = rows[:max_rows]
    return rows, eval_rows
