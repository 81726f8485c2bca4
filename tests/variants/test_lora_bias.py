"""LoRA with a bias of B: PEFT's numbers, folders and merge."""

from pathlib import Path

import peft
import pytest
import torch
from helpers.methods import Method
from torch import nn

import minilora as ml

LORA = Method(ml.LoRAConfig, peft.LoraConfig, r=4, lora_alpha=6, lora_bias=True, target_modules=["0"])


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(16, 12), torch.randn(3, 16)),
        (nn.Conv2d(4, 8, 3), torch.randn(2, 4, 6, 6)),
    ],
    ids=["linear", "convolution"],
)
def test_it_equals_peft(layer: nn.Module, x: torch.Tensor, start: bool) -> None:
    LORA.check_equals_peft(nn.Sequential(layer), x, init_lora_weights=start)


def test_folders_go_both_ways(tmp_path: Path) -> None:
    LORA.check_folders_both_ways(tmp_path, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def test_a_layer_without_a_bias_has_one_when_it_is_merged() -> None:
    """Which PEFT refuses."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    ml.add_adapter(model, LORA.config(init_lora_weights=False))
    x = torch.randn(2, 8)
    y = model(x)
    ml.merge(model)
    torch.testing.assert_close(model(x), y)
    ml.unmerge(model)
    assert model[0].base_layer.bias is None


def test_what_it_is_not_for_is_refused(tmp_path: Path) -> None:
    for values in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ml.InputError, match="lora_bias=True is for"):
            LORA.config(**values)
    model = nn.Sequential(nn.Embedding(8, 4))
    with pytest.raises(ml.InputError, match="0: lora_bias=True is not for an embedding"):
        ml.add_adapter(model, LORA.config())
    model = nn.Sequential(nn.Linear(8, 4))
    for name in ("a", "b"):
        ml.add_adapter(model, LORA.config(), name)
    with pytest.raises(ml.InputError):  # the sum of two would be without their biases
        ml.combine_adapters(model, ["a", "b"], [1.0, 1.0], "both")
    with pytest.raises(ml.InputError, match="no plain LoRA"):
        ml.save_adapter(model, tmp_path, "a", as_lora=True)
