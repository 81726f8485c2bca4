"""The rows of a training run: whatever the caller has, made into examples that something can be learned from."""

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

from torch import nn

from minilora.adapters import input_embedding
from minilora.data import IGNORE, Example, Rows, Skipped, encode_rows, given_rows, quoted
from minilora.errors import InputError
from minilora.progress import silent
from minilora.text import Tokenizer
from minilora.training.config import TrainConfig
from minilora.training.loss import label_tokens

TrainingRows = Rows | Sequence[Example]
logger = logging.getLogger("minilora")


def examples_of(
    rows: TrainingRows, eval_rows: TrainingRows | None, tokenizer: Tokenizer, config: TrainConfig
) -> tuple[list[Example], list[Example], list[Skipped]]:
    """The examples to train on, the held-out ones, and what of both cannot be used; InputError as `usable_examples`."""
    with nullcontext() if config.progress else silent():
        examples, skipped = usable_examples(rows, tokenizer, config)
        if eval_rows is None:
            if config.eval_every:
                raise InputError("eval_every needs eval_rows")
            return examples, [], skipped
        eval_examples, eval_skipped = usable_examples(eval_rows, tokenizer, config, "held-out")
    return examples, eval_examples, skipped + eval_skipped


def usable_examples(
    rows: TrainingRows, tokenizer: Tokenizer, config: TrainConfig, what: str = "training"
) -> tuple[list[Example], list[Skipped]]:
    """Examples that can be trained on, and the rows that cannot: they are reported, never silently dropped.

    Reported too, once for all rows, is what of them is not learned from, such as a key that nothing reads.

    Raises InputError where none is left, or where the rows are not all of a kind; `what` they are is named there.
    """
    usable: list[Example] = []
    skipped: list[Skipped] = []
    if isinstance(rows, Sequence) and rows and all(isinstance(row, Example) for row in rows):
        examples = cast(Sequence[Example], rows)
    else:
        given = given_rows(cast(Rows, rows), what, skipped if config.skip_bad_rows else None)
        encoded = encode_rows(
            given, tokenizer, config.max_length, mask_history=config.mask_history, skip_bad_rows=config.skip_bad_rows
        )
        examples, skipped = encoded.examples, skipped + encoded.skipped
        if encoded.remarks:
            remarks = "; ".join(f"{remark} ({count} rows)" for remark, count in encoded.remarks.most_common())
            logger.warning(f"of {len(given)} {what} rows: {remarks}")
    for example in examples:
        length = len(example.input_ids)
        if length > config.max_length:
            skipped.append(Skipped(example.source, f"{length} tokens, more than max_length={config.max_length}"))
        elif label_tokens([example]) == 0:
            skipped.append(Skipped(example.source, "no token to learn: the loss is taken on assistant messages"))
        else:
            usable.append(example)
    if skipped:
        total = len(usable) + len(skipped)
        message = f"{len(skipped)} of {total} {what} rows skipped ({quoted(skipped, 3)})"
        if not usable:
            raise InputError(f"no {what} row is left: {message}")
        logger.warning(message)
    return usable, skipped


def refuse_unreadable(model: nn.Module, examples: Sequence[Example]) -> None:
    """Raise InputError for a row longer than the model takes, or a token that it has no embedding for.

    On a GPU, such a token ends the process.
    """
    path = input_embedding(model)
    known = getattr(model.get_submodule(path), "num_embeddings", math.inf) if path else math.inf
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for example in examples:
        where, length = example.source or "an example", len(example.input_ids)
        if longest is not None and 0 < longest < length:  # -1: any length
            raise InputError(f"{where} has {length} tokens, the model takes {longest}: max_length={longest} skips it")
        tokens = {*example.input_ids, *example.labels} - {IGNORE}
        if unknown := [token for token in (min(tokens), max(tokens)) if not 0 <= token < known]:
            raise InputError(f"{where} has token {unknown[0]}, the model knows {known}: the tokenizer is another's")
