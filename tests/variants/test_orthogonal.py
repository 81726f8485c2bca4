"""The orthogonal start: the same draws as PEFT, and BA = 0."""

import pytest
import torch
from helpers.start import IN, adapter, assert_refused, assert_trains_as, base, conv, embedding, ours, theirs


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
def test_the_same_seed_draws_and_trains_as_peft(kind: str) -> None:
    assert_trains_as(ours("orthogonal", kind, use_rslora=True), theirs("orthogonal", kind, use_rslora=True))


def test_neither_is_zero_and_their_product_is() -> None:
    lora = adapter(ours("orthogonal"))
    assert lora.lora_A.abs().min() > 0
    assert lora.lora_B.abs().min() > 0
    assert lora.delta().abs().max() < 1e-7  # orthogonal to float32 rounding, of numbers near 0.1


def test_the_start_changes_nothing() -> None:
    x = torch.randn(7, IN)
    torch.testing.assert_close(ours("orthogonal")(x), base()(x), rtol=1e-6, atol=1e-6)


def test_what_it_cannot_start_is_refused() -> None:
    assert_refused("orthogonal", base(), "even r, not 3", r=3)
    assert_refused("orthogonal", conv(), "linear layer, not Conv2d")
    assert_refused("orthogonal", embedding(), "linear layer, not Embedding")
