"""Batches: padded on the right, and every example once in each epoch."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data.batches import batches, collate
from minilora.data.examples import IGNORE, Example


def test_collate_pads_on_the_right() -> None:
    batch = collate([Example([1, 2, 3], [IGNORE, 2, 3]), Example([2], [2])], pad_token_id=2)
    assert batch.input_ids.tolist() == [[1, 2, 3], [2, 2, 2]]
    assert batch.labels.tolist() == [[IGNORE, 2, 3], [2, IGNORE, IGNORE]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch)


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=200)


def examples_of(lengths: list[int]) -> list[Example]:
    return [Example([0] * length, [0] * length) for length in lengths]


@settings(deadline=None, max_examples=60)
@given(
    lengths=lengths,
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 5),
    group=st.booleans(),
)
def test_every_example_once_in_an_order_of_seed_and_epoch(
    lengths: list[int], batch_size: int, seed: int, epoch: int, group: bool
) -> None:
    examples = examples_of(lengths)
    order = batches(examples, batch_size, seed, epoch, group)
    assert sorted(i for batch in order for i in batch) == list(range(len(examples)))
    assert sorted(map(len, order), reverse=True)[:-1] == [batch_size] * (len(order) - 1)  # one may be smaller
    random.seed(1)  # whatever else draws random numbers
    torch.manual_seed(1)
    assert batches(examples, batch_size, seed, epoch, group) == order


@pytest.mark.parametrize("group", [False, True])
def test_seeds_and_epochs_give_other_orders(group: bool) -> None:
    examples = examples_of([1 + i % 17 for i in range(300)])
    orders = [batches(examples, 4, seed, epoch, group) for seed in range(3) for epoch in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_grouping_by_length_saves_padding_and_still_shuffles() -> None:
    examples = examples_of([random.Random(i).randint(5, 180) for i in range(1000)])

    def padded(order: list[list[int]]) -> int:
        return sum(len(batch) * max(len(examples[i].input_ids) for i in batch) for batch in order)

    tokens = sum(len(example.input_ids) for example in examples)
    shuffled, grouped = batches(examples, 8, 0, 0), batches(examples, 8, 0, 0, group_by_length=True)
    assert padded(grouped) - tokens < 0.1 * (padded(shuffled) - tokens)
    longest = [max(len(examples[i].input_ids) for i in batch) for batch in grouped]
    rises = sum(a < b for a, b in pairwise(longest))
    assert 0.35 < rises / len(longest) < 0.65  # half of 125 in a random order, all or none in a sorted one
