"""Examples put together for one pass of a model: padded, or packed end to end; and an epoch's order of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from minilora.data.examples import IGNORE, Example

WINDOW = 50  # batches whose rows are sorted by length together


class Batch(NamedTuple):
    """Examples padded on the right: int64 tensors (batch, length); `attention_mask` is 1 on tokens, 0 on padding."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad examples on the right to the longest of them; a padded place has the label -100."""
    shape = len(examples), max(len(example.input_ids) for example in examples)
    batch = Batch(torch.full(shape, pad_token_id), torch.full(shape, IGNORE), torch.zeros(shape, dtype=torch.int64))
    for i, example in enumerate(examples):
        length = len(example.input_ids)
        batch.input_ids[i, :length] = torch.tensor(example.input_ids)
        batch.labels[i, :length] = torch.tensor(example.labels)
        batch.attention_mask[i, :length] = 1
    return batch


class PackedBatch(NamedTuple):
    """Examples laid end to end, without padding: int64 tensors (1, tokens), and the number of tokens of each."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]


def pack(examples: Sequence[Example]) -> PackedBatch:
    """Lay examples end to end; the first token of each has the label -100: what stands before it is another row."""
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
