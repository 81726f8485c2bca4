"""The loss of a transformers model is that of its own logits, whatever is done to it."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.models import OTHER_CONFIGS, SMALL, transformers_model
from helpers.peft import peft_on
from helpers.training import random_rows
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from minilora.adapters.attach import add_adapter
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.mixed_batch import adapters_for_rows
from minilora.data.batches import collate
from minilora.training import loss as loss_module
from minilora.training.loss import summed_loss


def whole_loss(logits, batch):
    """Of the logits of all positions, by torch."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")


class VocabularyWatch(TorchDispatchMode):
    """The most rows of logits that any operation gives."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not func.is_view and tensor.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


def some_labels(count):
    """Rows of which not all the first positions have something to learn."""
    batch = collate(random_rows(count), 0)
    batch.labels[:, [1, 4]] = -100
    return batch


def assert_loss_of_its_own_logits(model, batch):
    """Loss and gradients, of what trains, are those of the logits that the model gives when it is called."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = whole_loss(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, batch)
    likes = torch.autograd.grad(expected, parameters, allow_unused=True)
    loss = summed_loss(model, batch)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    # float32 sums in another order, as a share of the loss and of the largest gradient
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    largest = max(like.abs().max().item() for like in likes if like is not None)
    for gradient, like in zip(gradients, likes, strict=True):
        assert (gradient is None) == (like is None)
        if like is not None:
            torch.testing.assert_close(gradient, like, rtol=0, atol=1e-5 * largest)


PARTS = {"layers": 1, "attention_heads": 4, "ffn_dim": 112}
# what they do after the head needs all logits of a position, and they are told which positions are wanted
COMPUTE_LOGITS = ("cohere", "cohere2", "granite", "gemma2", "opt")


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_any_architecture_has_the_loss_of_its_own_logits_and_not_all_of_them(name, monkeypatch):
    monkeypatch.setattr(loss_module, "ROWS_AT_ONCE", 4)
    model = transformers_model(OTHER_CONFIGS[name])
    batch = some_labels(4)
    assert_loss_of_its_own_logits(model, batch)
    batch.labels[:, 9:] = -100
    with VocabularyWatch(model.config.vocab_size) as watch, torch.no_grad():
        summed_loss(model, batch)
    positions = (batch.labels != -100).any(0).sum().item()
    assert 4 < len(batch.labels) * positions < batch.labels.numel()
    assert watch.rows == (len(batch.labels) * positions if name in COMPUTE_LOGITS else 4)


def test_a_decoder_after_an_encoder_has_the_loss_of_its_own_logits():
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in PARTS.items()}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=97, d_model=64, **sizes)).eval()
    model.final_logits_bias.normal_()
    assert_loss_of_its_own_logits(model, some_labels(3))


def test_a_model_of_images_too_has_the_loss_of_its_own_logits():
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=8, patch_size=4), text_config=LlamaConfig(**SMALL)
    )
    model = LlavaForConditionalGeneration(config).eval()
    assert_loss_of_its_own_logits(model, some_labels(3))


class OwnHead(LlamaForCausalLM):
    """Multiplies with the head's weight, and does not call it."""

    def forward(self, **inputs):
        hidden = self.model(**inputs).last_hidden_state
        return SimpleNamespace(logits=hidden @ self.lm_head.weight.T)


class AddsUp(LlamaForCausalLM):
    """Adds up the logits of the positions that it computes."""

    def forward(self, logits_to_keep=0, **inputs):
        output = super().forward(logits_to_keep=logits_to_keep, **inputs)
        output.logits = output.logits.cumsum(1)
        return output


class TwoHeads(LlamaForCausalLM):
    """Calls its head twice, and gives the mean."""

    def forward(self, **inputs):
        hidden = self.model(**inputs).last_hidden_state
        return SimpleNamespace(logits=(self.lm_head(hidden) + self.lm_head(hidden.roll(1, 1))) / 2)


def a_hook(on, hook):
    def change(model):
        on(model).register_forward_hook(hook)

    return change


def add_logits_up(module, args, output):
    output.logits = output.logits.cumsum(1)


def scale_in_place(module, args, output):
    output.logits.mul_(3)


def replace_forward(model):  # as accelerate does
    forward = model.forward

    @functools.wraps(forward)
    def adding_up(**inputs):
        return SimpleNamespace(logits=forward(**inputs).logits.cumsum(1))

    model.forward = adding_up


def adapt(**config):
    def change(model):
        add_adapter(model, LoRAConfig(r=2, **config))
        with torch.no_grad():
            for parameter in adapter_parameters(model).values():
                parameter.add_(0.3 * torch.randn_like(parameter))

    return change


def scale_head(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 3 * forward(hidden)


CHANGES = {
    "head's forward replaced": scale_head,
    "hook before the head": lambda model: model.lm_head.register_forward_pre_hook(lambda module, args: 3 * args[0]),
    "hook on the head": a_hook(lambda model: model.lm_head, lambda module, args, y: y.cumsum(1)),
    "hook on the body": a_hook(lambda model: model.model.norm, lambda module, args, y: 3 * y),
    "hook on the model": a_hook(lambda model: model, add_logits_up),
    "hook on the model, in place": a_hook(lambda model: model, scale_in_place),
    "hook that only looks": a_hook(lambda model: model, lambda module, args, output: print(output.logits.sum())),
    "forward replaced": replace_forward,
    "a subclass": lambda model: setattr(model, "__class__", AddsUp),
    "head not called": lambda model: setattr(model, "__class__", OwnHead),
    "head called twice": lambda model: setattr(model, "__class__", TwoHeads),
    "LoRA on the head": adapt(target_modules=["lm_head", "v_proj"]),
    "LoRA on a tied head": adapt(target_modules=["lm_head"], ensure_weight_tying=True),
    "a copy of the head": adapt(target_modules=["v_proj"], modules_to_save=["lm_head"]),
    "rows of the embedding": adapt(target_modules=["v_proj"], trainable_token_indices=[5, 0]),
    "recomputed": lambda model: model.train().activation_checkpointing_enable({"use_reentrant": False}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_is_done_to_a_transformers_model_it_is_the_loss_of_its_logits(change):
    config = SMALL | {"tie_word_embeddings": True, "use_cache": False}
    model = transformers_model(LlamaConfig(**config))
    change(model)
    assert_loss_of_its_own_logits(model, some_labels(3))


def test_under_autocast_too():
    model = transformers_model(LlamaConfig(**SMALL))
    batch = collate(random_rows(3), 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_loss(model, batch)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert logits.dtype == torch.bfloat16
    # the same bfloat16 logits; the sum in float32
    torch.testing.assert_close(loss, whole_loss(logits.float(), batch), rtol=1e-5, atol=0)


def test_a_peft_model_has_the_loss_of_its_own_logits():
    model = peft_on(transformers_model(LlamaConfig(**SMALL)), {"target_modules": ["lm_head", "q_proj"]})
    assert_loss_of_its_own_logits(model, some_labels(3))


def test_rows_with_an_adapter_each_keep_it_in_the_head():
    model = transformers_model(LlamaConfig(**SMALL))
    adapt(target_modules=["lm_head", "v_proj"])(model)
    with adapters_for_rows(model, ["default", "__base__", "default"]):
        assert_loss_of_its_own_logits(model, some_labels(3))
