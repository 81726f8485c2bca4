"""What a batch may be, and the loss on it: transformers' own, whatever the form."""

from typing import Any

import pytest
import torch
from helpers.adapters import IDS, tiny_llama
from torch import Tensor, nn

from minilora.adapters.attach import add_adapter
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig
from minilora.data.batches import Batch
from minilora.errors import InputError
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.training.loss import language_model_loss
from minilora.variants.calibration.batches import as_list, loras_to_start
from minilora.variants.ia3 import IA3Config

MASK = torch.ones_like(IDS).index_fill(1, torch.arange(9, 12), 0)
LABELS = IDS.masked_fill(MASK == 0, -100)


def both() -> list[nn.Module]:
    """transformers' model, and minilora's of the same weights."""
    theirs = tiny_llama()
    ours = Transformer(ModelConfig.from_hf(theirs.config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    return [theirs, ours]


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        (IDS, {"labels": IDS}),
        ({"input_ids": IDS}, {"labels": IDS}),
        ({"input_ids": IDS, "attention_mask": MASK}, {"attention_mask": MASK, "labels": LABELS}),
        (Batch(IDS, LABELS, MASK)._asdict(), {"attention_mask": MASK, "labels": LABELS}),
    ],
    ids=["ids", "mapping", "padded", "Batch"],
)
def test_the_loss_is_that_of_transformers(batch: Any, given: dict[str, Tensor]) -> None:
    expected = tiny_llama()(input_ids=IDS, **given).loss
    for model in both():
        torch.testing.assert_close(language_model_loss(model, batch), expected)


def test_the_batch_is_left_as_it_was() -> None:
    batch = {"input_ids": IDS}
    language_model_loss(tiny_llama(), batch)
    assert list(batch) == ["input_ids"]


@pytest.mark.parametrize("batch", [torch.ones(2, 3), (IDS, IDS), {"pixels": IDS}, "text"])
def test_what_is_no_batch_of_tokens_needs_a_forward(batch: Any) -> None:
    with pytest.raises(InputError, match=r"token ids .*forward=function"):
        language_model_loss(tiny_llama(), batch)


def test_a_model_without_a_loss_needs_a_forward() -> None:
    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 4)

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            return self.embedding(input_ids)

    with pytest.raises(InputError, match="Headless returns no loss: give forward="):
        language_model_loss(Headless(), IDS)


def test_batches_are_read_once_and_some_there_must_be() -> None:
    assert as_list(iter([1, 2])) == [1, 2]
    with pytest.raises(InputError, match="no batches"):
        as_list([])


def test_only_the_updates_of_layers_are_initialized_from_data() -> None:
    model = tiny_llama()
    add_adapter(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights="eva"))
    found = loras_to_start(model, "default", "eva")
    assert list(found) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert all(type(each) is LoRA for each in found.values())
    add_adapter(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "other")
    with pytest.raises(InputError, match="'other' is no LoRA"):
        loras_to_start(model, "other", "eva")
