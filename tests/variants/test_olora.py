"""OLoRA: PEFT's numbers without touching W."""

from typing import Any

import peft
import pytest
import torch
from helpers.start import (
    ALPHA,
    IN,
    OUT,
    R,
    adapter,
    as_linear,
    assert_refused,
    assert_trains_as,
    base,
    conv,
    embedding,
    ours,
    rel,
    theirs,
)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_output_gradients_and_trained_parameters_equal_peft(kind: str, config: dict[str, Any]) -> None:
    assert_trains_as(ours("olora", kind, **config), theirs("olora", kind, **config))


def test_conv1d_starts_as_the_linear_layer_that_it_is() -> None:
    """PEFT 0.21 decomposes W as it is stored, (in, out), so that A does not fit the input."""
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights="olora")
    assert_trains_as(ours("olora", "conv1d"), peft.get_peft_model(as_linear(base("conv1d")), config))


def test_b_is_orthonormal_and_a_triangular() -> None:
    model = ours("olora")
    A, B = adapter(model).lora_A, adapter(model).lora_B
    torch.testing.assert_close(B.T @ B, torch.eye(R))
    assert torch.equal(A, A.triu())
    assert rel(B @ A[:, :R], model[0].base_layer.weight[:, :R]) < 1e-6  # Q R: the first columns of W need no more


def test_w_stays_and_the_start_changes_nothing() -> None:
    plain, model, x = base(), ours("olora"), torch.randn(7, IN)
    assert torch.equal(model[0].base_layer.weight, plain[0].weight)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-6, atol=1e-6)  # b + 0 + Wx: another order of summation


def test_what_it_cannot_start_is_refused() -> None:
    assert_refused("olora", conv(), "linear layer, not Conv2d")
    assert_refused("olora", embedding(), "linear layer, not Embedding")
    assert_refused("olora", base(), f"at most {OUT}", r=OUT + 1)
