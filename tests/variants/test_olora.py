"""OLoRA: PEFT's numbers without touching W."""

from typing import Any

import peft
import pytest
import torch
from helpers.start import ALPHA, OUT, R, Start, adapter, as_linear, assert_trains_as, base, rel

OLORA = Start("olora")


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_output_gradients_and_trained_parameters_equal_peft(kind: str, config: dict[str, Any]) -> None:
    OLORA.check_trains_as_peft(kind, **config)


def test_conv1d_starts_as_the_linear_layer_that_it_is() -> None:
    """PEFT 0.21 decomposes W as it is stored, (in, out), so that A does not fit the input."""
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights="olora")
    assert_trains_as(OLORA.ours("conv1d"), peft.get_peft_model(as_linear(base("conv1d")), config))


def test_b_is_orthonormal_and_a_triangular() -> None:
    model = OLORA.ours()
    A, B = adapter(model).lora_A, adapter(model).lora_B
    torch.testing.assert_close(B.T @ B, torch.eye(R))
    assert torch.equal(A, A.triu())
    assert rel(B @ A[:, :R], model[0].base_layer.weight[:, :R]) < 1e-6  # Q R: the first columns of W need no more


def test_w_stays_and_the_start_changes_nothing() -> None:
    OLORA.check_starts_at_the_base()


def test_what_it_cannot_start_is_refused() -> None:
    OLORA.check_takes_linear_layers_only()
    OLORA.check_refuses(base(), f"at most {OUT}", r=OUT + 1)
