"""transformers' resize_token_embeddings on models with adapters."""

import copy
import io
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import FLOAT32, logits, tiny_llama
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import minilora as ml

ADAPTED: dict[str, dict[str, Any]] = {
    "LoRA on the head": {"target_modules": ["lm_head"]},
    "LoRA on the embedding": {"target_modules": ["embed_tokens"]},
    "a copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a copy of the embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
}


def adapted(tied: bool, **config: Any) -> Any:
    model = tiny_llama(tied=tied)
    ml.add_adapter(model, ml.LoRAConfig(init_lora_weights=False, **config))
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", ADAPTED)
def test_an_adapted_embedding_or_head_is_not_resized_and_nothing_is_changed(case: str, tied: bool) -> None:
    model = adapted(tied, **ADAPTED[case])
    before, modules = logits(model), dict(model.named_modules())
    for inner in (model, model.model):
        if inner is model or "embed" in case:
            with pytest.raises(ml.InputError, match=r"on .*(lm_head|embed_tokens) are for 64 tokens: resize .* before"):
                inner.resize_token_embeddings(70)
    assert model.resize_token_embeddings() is model.resize_token_embeddings(60, 8) is model.get_input_embeddings()
    assert dict(model.named_modules()) == modules and torch.equal(logits(model), before)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".adapters." not in name)
    copied = copy.deepcopy(model)
    with pytest.raises(ml.InputError):
        copied.resize_token_embeddings(70)
    ml.unload(model, merge=True)
    model.resize_token_embeddings(70)
    torch.testing.assert_close(logits(model)[..., :64], before, **FLOAT32)
    assert "resize_token_embeddings" not in vars(model)


def test_with_peft_it_stops_half_way() -> None:
    """The reason to refuse it before a change."""
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(TypeError, match="not an instance of"):
        theirs.resize_token_embeddings(70)
    assert (theirs.get_input_embeddings().num_embeddings, theirs.get_output_embeddings().out_features) == (70, 64)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_with_adapters_elsewhere_is_resized(tied: bool) -> None:
    model = adapted(tied, target_modules=["q_proj"])
    before = logits(model)
    model.resize_token_embeddings(70)
    assert torch.equal(logits(model)[..., :64], before) and logits(model).shape[-1] == 70
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all("lora" in name for name in ml.trainable_parameters(model))


def test_what_is_called_in_the_place_of_the_embedding_is_looked_at_too() -> None:
    model: Any = T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    )
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["encoder.embed_tokens"]))
    with pytest.raises(ml.InputError, match=r"on encoder\.embed_tokens are for 60 tokens"):
        model.resize_token_embeddings(70)


def test_a_model_with_adapters_is_pickled_and_tied_again() -> None:
    model = adapted(True, target_modules=["lm_head"])
    before, file = logits(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), before)
    keys = model.state_dict().keys()
    model.tie_weights()
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight and model.state_dict().keys() == keys


def test_a_parameter_that_is_set_on_an_adapted_layer_is_the_layer_s() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["0"], init_lora_weights=False))
    keys, weight = model.state_dict().keys(), nn.Parameter(torch.eye(4), requires_grad=False)
    model[0].weight = weight
    assert ml.unload(model)[0].weight is weight and len(keys) == 4  # type: ignore[index]
