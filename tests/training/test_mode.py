"""A model made ready to train, and put back; what each mode computes is in test_train.py and models/test_offload.py."""

import pytest
import torch
from helpers.training import LLAMA, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minilora.adapters.evaluating import evaluating
from minilora.errors import InputError
from minilora.training.config import TrainConfig
from minilora.training.mode import training_mode


@pytest.mark.parametrize("was_training", [True, False])
def test_the_model_is_put_back_after_an_error_too(was_training):
    model = tiny_model().train(was_training)
    with pytest.raises(ZeroDivisionError), training_mode(model, TrainConfig(gradient_checkpointing=True)):
        assert model.training
        assert model.gradient_checkpointing
        raise ZeroDivisionError
    assert model.training == was_training
    assert not model.gradient_checkpointing


def test_every_module_and_what_was_recomputed_before_stay_as_they_were():
    model = tiny_model().train()
    model.model.embed_tokens.eval()
    model.gradient_checkpointing = model.offload_activations = True
    modes = [module.training for module in model.modules()]
    with training_mode(model, TrainConfig(gradient_checkpointing=True)):
        assert all(module.training for module in model.modules())
        assert (model.gradient_checkpointing, model.offload_activations) == (True, False)
    assert [module.training for module in model.modules()] == modes
    assert (model.gradient_checkpointing, model.offload_activations) == (True, True)
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes


@pytest.mark.filterwarnings("error::FutureWarning")  # names that transformers will drop
@pytest.mark.parametrize("before", [True, False])
def test_a_transformers_model_recomputes_as_it_did_before(before):
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).requires_grad_(False)
    if before:
        model.activation_checkpointing_enable({"use_reentrant": True}, every_n_layers=2)
    attributes = [dict(vars(module)) for module in model.modules()]
    hooks = list(model.model.embed_tokens._forward_hooks)
    input_ids = torch.ones(1, 3, dtype=torch.int64)
    with training_mode(model, TrainConfig(gradient_checkpointing=True)):
        assert all(block.gradient_checkpointing for block in model.model.layers)
        assert before or not model(input_ids).logits.requires_grad, "nothing trains"
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert list(model.model.embed_tokens._forward_hooks) == hooks
    model.disable_input_require_grads()  # the hook is still the caller's to remove
    assert not model.model.embed_tokens._forward_hooks


def test_attention_goes_row_by_row_in_training_alone():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with training_mode(tiny_model(), TrainConfig()):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before, "it is a transformers model's affair"
    with training_mode(LlamaForCausalLM(LlamaConfig(**LLAMA)), TrainConfig()):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_a_model_that_cannot_recompute_is_refused_and_unchanged(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)  # as a few of transformers' models
    config = TrainConfig(gradient_checkpointing=True)
    for model in (torch.nn.Sequential(torch.nn.Linear(2, 2)), LlamaForCausalLM(LlamaConfig(**LLAMA))):
        model.eval()
        refusal = f"{type(model).__name__} has no gradient checkpointing: set gradient_checkpointing to"
        with pytest.raises(InputError, match=refusal), training_mode(model, config):
            pass
        assert not model.training
