"""Examples put together for one pass of a model: padded, or packed; and an epoch's order of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from minilora.data.examples import IGNORE, Example

WINDOW = 50  # batches whose rows are sorted by length together


class Batch(NamedTuple):
    """Examples padded on the right: int64 tensors (batch, length); `attention_mask` is 1 on tokens, 0 on padding."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad examples on the right to the longest of them; a padded place has the label -100."""
    input_ids = [torch.tensor(example.input_ids, dtype=torch.int64) for example in examples]
    labels = [torch.tensor(example.labels, dtype=torch.int64) for example in examples]
    return Batch(
        pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
    )


class PackedBatch(NamedTuple):
    """Packed sequences, without padding: int64 tensors (1, tokens), and the number of tokens of each."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]


def pack(examples: Sequence[Example]) -> PackedBatch:
    """Pack examples into one sequence; the first token of each has the label -100: it follows another row's last."""
    input_ids = [id for example in examples for id in example.input_ids]
    labels = [IGNORE if i == 0 else label for example in examples for i, label in enumerate(example.labels)]
    lengths = tuple(len(example.input_ids) for example in examples)
    return PackedBatch(torch.tensor([input_ids]), torch.tensor([labels]), lengths)


def batches(
    examples: Sequence[Example], batch_size: int, seed: int = 0, epoch: int = 0, group_by_length: bool = False
) -> list[list[int]]:
    """The indices of one epoch's batches: every example exactly once, in an order given by seed and epoch alone.

    With `group_by_length`, 50 batches' worth of shuffled examples at a time are sorted by length before they are cut
    into batches, and then the batches are shuffled: little padding, and still a random order.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(examples)).tolist()
    if group_by_length:
        windows = (order[i : i + WINDOW * batch_size] for i in range(0, len(order), WINDOW * batch_size))
        order = [i for window in windows for i in sorted(window, key=lambda i: len(examples[i].input_ids))]
    cut = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if group_by_length:
        random.shuffle(cut)
    return cut
