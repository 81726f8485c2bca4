"""The orthogonal start: the same draws as PEFT, and BA = 0."""

import pytest
from helpers.start import Start, adapter, base

ORTHOGONAL = Start("orthogonal")


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
def test_the_same_seed_draws_and_trains_as_peft(kind: str) -> None:
    ORTHOGONAL.check_trains_as_peft(kind, use_rslora=True)


def test_neither_is_zero_and_their_product_is() -> None:
    lora = adapter(ORTHOGONAL.ours())
    assert lora.lora_A.abs().min() > 0
    assert lora.lora_B.abs().min() > 0
    assert lora.delta().abs().max() < 1e-7  # orthogonal to float32 rounding, of numbers near 0.1


def test_the_start_changes_nothing() -> None:
    ORTHOGONAL.check_starts_at_the_base()


def test_what_it_cannot_start_is_refused() -> None:
    ORTHOGONAL.check_refuses(base(), "even r, not 3", r=3)
    ORTHOGONAL.check_takes_linear_layers_only()
