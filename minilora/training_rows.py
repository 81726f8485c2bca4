"""The rows of a training run: whatever the caller has, made into examples that something can be learned from."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from minilora.data import Example, Row, Skipped, as_rows, encode_rows, load_rows
from minilora.errors import InputError
from minilora.loss import label_tokens
from minilora.tokenizer import Tokenizer

__all__ = ["Rows", "usable_examples"]

Rows = str | Path | Sequence[Row] | Sequence[dict[str, Any]] | Sequence[Example]
logger = logging.getLogger("minilora")


def usable_examples(
    rows: Rows, tokenizer: Tokenizer, max_length: int, what: str = "training"
) -> tuple[list[Example], list[Skipped]]:
    """Examples that can be trained on, and the rows that cannot: they are reported, never silently dropped.

    Raises InputError where none is left, or where the rows are not all of a kind; `what` they are is named there.
    """
    examples, skipped = _examples(rows, tokenizer, max_length, what)
    usable = []
    for example in examples:
        if len(example.input_ids) > max_length:
            skipped.append(
                Skipped(example.source, f"{len(example.input_ids)} tokens, more than max_length={max_length}")
            )
        elif label_tokens([example]) == 0:
            skipped.append(Skipped(example.source, "no token to learn: the loss is taken on assistant messages"))
        else:
            usable.append(example)
    if skipped:
        first = "; ".join(f"{row.source or 'a row'}: {row.reason}" for row in skipped[:3])
        given = len(usable) + len(skipped)
        message = f"{len(skipped)} of {given} {what} rows skipped ({first}{'; …' if len(skipped) > 3 else ''})"
        if not usable:
            raise InputError(f"no {what} row is left: {message}")
        logger.warning(message)
    return usable, skipped


def _examples(rows: Rows, tokenizer: Tokenizer, max_length: int, what: str) -> tuple[Sequence[Example], list[Skipped]]:
    if isinstance(rows, str | Path):
        rows = load_rows(rows)
    if not rows:
        raise InputError(f"there are no {what} rows")
    kinds = {type(row) for row in rows}
    if kinds == {Example}:
        return cast(Sequence[Example], rows), []
    if kinds == {Row} or kinds == {dict}:
        if not isinstance(tokenizer, Tokenizer):
            raise InputError(
                f"a {type(tokenizer).__name__} is not minilora's tokenizer: take that of ml.load, or with a model of"
                " transformers minilora.tokenizer.Tokenizer.from_folder(its folder)"
            )
        given = cast(list[Row], rows) if kinds == {Row} else as_rows(cast(list[dict[str, Any]], rows))
        encoded = encode_rows(given, tokenizer, max_length)
        return encoded.examples, list(encoded.skipped)
    names = " and ".join(sorted(kind.__name__ for kind in kinds))
    raise InputError(f"{what} rows must be a path, or all dicts, all Rows or all Examples, not {names}")
