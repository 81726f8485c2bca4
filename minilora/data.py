"""Rows to token ids, labels and batches, with the loss on what the assistant says and nowhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from minilora.chat_template import Span
from minilora.errors import InputError
from minilora.rows import Row, as_rows, load_rows
from minilora.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Encoded",
    "Example",
    "Row",
    "Skipped",
    "as_rows",
    "batches",
    "collate",
    "encode_rows",
    "load_rows",
    "show_example",
]

IGNORE = -100  # PyTorch's cross_entropy skips this label


@dataclass(frozen=True)
class Example:
    """One training sequence: `labels[i]` is `input_ids[i]` where it is learned, -100 where it is only read."""

    input_ids: list[int]
    labels: list[int]
    source: str = ""


@dataclass(frozen=True)
class Skipped:
    """A row that was left out, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Encoded:
    """What `encode_rows` made of its rows: every one is in `examples` or in `skipped`."""

    examples: list[Example]
    skipped: list[Skipped]


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int | None = None) -> Encoded:
    """Render, tokenize and label rows; rows longer than `max_length` tokens are in `skipped`, with the reason.

    Raises:
        InputError: a row's conversation does not suit the chat template.
    """
    rendered = [_render(row, tokenizer) for row in rows]
    encodings = tokenizer.encode_batch([text for text, _ in rendered])
    examples: list[Example] = []
    skipped: list[Skipped] = []
    for row, (_, spans), (ids, offsets) in zip(rows, rendered, encodings, strict=True):
        labels = [
            id if any(start < b and end > a for a, b in spans) else IGNORE
            for id, (start, end) in zip(ids, offsets, strict=True)
        ]
        last = max((i for i, label in enumerate(labels) if label != IGNORE), default=-1)
        if last == -1 or labels[last] not in tokenizer.eos_token_ids:
            ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        if max_length is not None and len(ids) > max_length:
            skipped.append(Skipped(row.source, f"{len(ids)} tokens, more than max_length={max_length}"))
        else:
            examples.append(Example(ids, labels, row.source))
    return Encoded(examples, skipped)


def _render(row: Row, tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    if row.messages is None:
        text = row.text or ""
        return text, [(0, len(text))]
    if row.untemplated and tokenizer.chat_template is None:
        prompt, completion = row.messages[0]["content"], row.messages[1]["content"]
        return prompt + completion, [(len(prompt), len(prompt) + len(completion))]
    text = tokenizer.apply_chat_template(row.messages, tools=row.tools)
    spans: list[Span] = []
    for i, message in enumerate(row.messages):
        if message["role"] == "assistant" and i >= row.context:
            start = tokenizer.apply_chat_template(row.messages[:i], True, tools=row.tools)
            end = tokenizer.apply_chat_template(row.messages[: i + 1], tools=row.tools).rstrip()
            if not (text.startswith(end) and end.startswith(start)):
                raise InputError(f"{row.source}: the chat template rewrites earlier messages")
            spans.append((len(start), len(end)))
    return text, spans


class Batch(NamedTuple):
    """Right-padded examples; each int64 (batch, length). `attention_mask` is 1 on tokens, 0 on padding."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad examples on the right to the longest of them; padding has label -100, whatever its token id."""
    length = max(len(example.input_ids) for example in examples)
    shape = (len(examples), length)
    batch = Batch(
        torch.full(shape, pad_token_id), torch.full(shape, IGNORE), torch.zeros(shape, dtype=torch.int64)
    )
    for i, example in enumerate(examples):
        n = len(example.input_ids)
        batch.input_ids[i, :n] = torch.tensor(example.input_ids)
        batch.labels[i, :n] = torch.tensor(example.labels)
        batch.attention_mask[i, :n] = 1
    return batch


def batches(
    examples: Sequence[Example], batch_size: int, seed: int = 0, epoch: int = 0, group_by_length: bool = False
) -> list[list[int]]:
    """The indices of each batch of one epoch: every example exactly once, the same for the same seed and epoch.

    With `group_by_length`, windows of 50 batches' worth of shuffled examples are sorted by length and cut into
    batches, and the batches are shuffled: little padding, and still a random order.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(examples)).tolist()
    if group_by_length:
        window = 50 * batch_size
        order = [
            i
            for start in range(0, len(order), window)
            for i in sorted(order[start : start + window], key=lambda i: len(examples[i].input_ids))
        ]
    cut = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if group_by_length:
        cut = [cut[i] for i in random.permutation(len(cut))]
    return cut


DIM, GREEN, RESET = "\x1b[2m", "\x1b[32m", "\x1b[0m"


def show_example(example: Example, tokenizer: Tokenizer, color: bool | None = None) -> str:
    """The example's text with special tokens; learned tokens in green, the others dim.

    Without colour (NO_COLOR is set, or standard output is not a terminal) the learned tokens stand in ⟦ ⟧.
    """
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    pieces = []
    pairs = zip(example.input_ids, example.labels, strict=True)
    for learned, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        text = tokenizer.decode([id for id, _ in group], skip_special_tokens=False)
        if color:
            pieces.append(f"{GREEN if learned else DIM}{text}{RESET}")
        else:
            pieces.append(f"⟦{text}⟧" if learned else text)
    return "".join(pieces)
