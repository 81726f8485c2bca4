"""Sampling: exact probabilities, and what transformers' own filters keep."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from helpers.sampling import chi_square
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minilora.errors import InputError
from minilora.evaluation.sampling import GREEDY, Sampling, choose, draw_uniforms, probabilities


def test_a_later_token_is_drawn_independently_of_the_first() -> None:
    """Two tokens from the same fair distribution: all 16 pairs are equally likely."""
    logits, n = torch.zeros(1, 4), 8000
    uniforms = draw_uniforms(Sampling(1.0, seed=2), n, 2)
    first, second = (choose(logits.expand(n, 4), Sampling(1.0), uniforms[:, step]) for step in (0, 1))
    statistic, bound = chi_square(Counter((4 * first + second).tolist()), torch.full((16,), 1 / 16), n)
    assert statistic < bound


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.2, 3),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.05, 1),
)
def test_top_k_and_top_p_keep_what_transformers_keeps(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed)) * 3
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        # Where a sum of probabilities meets top_p to within rounding, either choice is right.
        sums = theirs(None, logits).double().softmax(-1).sort(descending=True).values.cumsum(-1)
        assume(float((sums - top_p).abs().min()) > 1e-5 or top_p == 1)
        theirs.append(TopPLogitsWarper(top_p))
    expected = theirs(None, logits).softmax(-1)
    ours = probabilities(logits, Sampling(temperature, top_k, top_p))
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("temperature", [1e-45, 1e-8, 1e8, 1e38])
def test_extreme_temperatures_are_the_limits(temperature: float) -> None:
    """Cold is greedy, hot is uniform over what top_k keeps."""
    logits = torch.tensor([[3.0, 100.0, -200.0, 99.0]])
    expected = [0, 1, 0, 0] if temperature < 1 else [0, 0.5, 0, 0.5]
    # 99 - 100 over 1e8 is a probability 1e-8 from a half
    torch.testing.assert_close(probabilities(logits, Sampling(temperature, top_k=2)), torch.tensor([expected]).float())


def test_the_ends_of_the_unit_interval_choose_tokens_that_are_possible() -> None:
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]]).expand(2, 4)
    almost_one = 1 - 2.0**-53
    assert choose(logits, Sampling(1.0), torch.tensor([0.0, almost_one]).double()).tolist() == [1, 2]
    assert choose(logits, GREEDY, None).tolist() == [2, 2]


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(damage: float) -> None:
    for sampling, uniform in ((GREEDY, None), (Sampling(1.0), torch.tensor([0.5]).double())):
        with pytest.raises(InputError, match="NaN or infinite"):
            choose(torch.tensor([[0.0, damage, 1.0]]), sampling, uniform)


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_sampling_refuses_what_makes_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        Sampling(**values)
