"""Biases, saved modules, trainable tokens and tied pairs: PEFT's numbers, and a base model that stays as it was."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_helpers import IDS, logits, tiny_llama
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from minilora.adapters import (
    adapter_names,
    adapter_parameters,
    adapters_named,
    add_adapter,
    disable_adapters,
    merge,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge,
)
from minilora.errors import InputError
from minilora.linear4bit import NF4Linear
from minilora.lora import LoRAConfig
from minilora.mixed_batch import adapters_for_rows
from minilora.peft_format import load_adapter, save_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(tie_word_embeddings|save_embedding_layers|fan_in_fan_out|ensure_weight_tying|missing keys|config file)"
)

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}  # two layers of sums over dozens of terms, in another order than PEFT's


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Conv1D layers with biases that are not zero, LayerNorms, learnt positions, a tied head."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "tied llama": lambda: tiny_llama(tied=True)}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bias of the adapted layers": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "all biases and DoRA": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "all", "use_dora": True}),
    "all biases and a saved module": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f", "h.1.mlp.c_fc"]},
    ),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a tied pair's head": ("tied llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a tied pair's embedding": ("tied llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "a container": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp", "norm"]}),
    "tied, saved": (
        "tied llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [63, 1, 7]}),
    "tokens of a tied pair": ("tied llama", {"target_modules": ["q_proj"], "trainable_token_indices": [63, 1, 7]}),
    "other tokens for the head": (
        "tied llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 1], "lm_head": [0, 7, 5]}},
    ),
    "tokens of positions": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wpe": [0, 3]}}),
    "LoRA on the embedding of a tied pair": ("tied llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "LoRA on the head of a tied pair": ("tied llama", {"target_modules": ["lm_head", "q_proj"]}),
    "LoRA on both": ("tied llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    "LoRA tied": (
        "tied llama",
        {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True, "lora_alpha": 24},
    ),
    "LoRA tied, by the embedding": (
        "tied llama",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "lora_alpha": 24},
    ),
}


def peft_on(model: nn.Module, config: dict[str, Any]) -> peft.PeftModel:
    torch.manual_seed(3)
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **config)).eval()


def ours_on(model: nn.Module, config: dict[str, Any], name: str = "default") -> nn.Module:
    torch.manual_seed(3)
    add_adapter(model, LoRAConfig(r=4, **config), name)
    return model


def saved(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """What the file of an adapter holds, by PEFT's keys."""
    return {
        f"base_model.model.{path}.{end}": tensor
        for path, adapter in adapters_named(model, name).items()
        for end, tensor in adapter.saved_tensors().items()
    }


def trained_by_peft(model: peft.PeftModel) -> dict[str, nn.Parameter]:
    """What PEFT trains, under the keys of its file."""
    return {
        name.replace(".modules_to_save.default.", ".").replace(".default", "").replace("vector.weight", "vector"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def shake(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Move every number that the adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in dict.fromkeys(adapter_parameters(model, name).values()):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("case", CASES)
def test_it_starts_as_the_base_model_and_trains_what_peft_does_by_the_same_gradients(case: str) -> None:
    model, config = CASES[case]
    base = MODELS[model]()
    theirs = peft_on(base, config)
    ours = ours_on(copy.deepcopy(base), config)
    assert torch.allclose(logits(ours), logits(base), **FLOAT32)
    shake(ours)
    expected, tensors = trained_by_peft(theirs), saved(ours)
    assert {key: value.shape for key, value in tensors.items()}.items() >= {
        key: value.shape for key, value in expected.items() if "original_module" not in key
    }.items()
    for key, parameter in expected.items():
        if key in tensors:
            parameter.data.copy_(tensors[key])
    torch.testing.assert_close(logits(ours), logits(theirs), **FLOAT32)
    for key in tensors:
        if tensors[key].is_leaf:
            tensors[key].grad = None
    for one in (ours, theirs):
        one(IDS, labels=IDS).loss.backward()
    for key, tensor in tensors.items():
        if not tensor.is_leaf or key not in expected:  # the head's factors are the embedding's; tied copies are one
            continue
        gradient = expected[key].grad
        twins = [other for other in tensors if tensors[other] is tensor or _is_transposed(tensors[other], tensor)]
        for twin in twins:  # PEFT's tied parameters share memory and have a gradient each
            if twin != key and twin in expected and expected[twin] is not expected[key]:
                other = expected[twin].grad
                gradient = gradient + (other.T if _is_transposed(tensors[twin], tensor) else other)
        torch.testing.assert_close(tensor.grad, gradient, **FLOAT32)


def _is_transposed(view: Tensor, tensor: Tensor) -> bool:
    return view is not tensor and view.data_ptr() == tensor.data_ptr() and view.shape == tensor.T.shape


@pytest.mark.parametrize("case", CASES)
def test_both_ways_through_the_folder(case: str, tmp_path: Path) -> None:
    model, config = CASES[case]
    base = MODELS[model]()
    ours = ours_on(copy.deepcopy(base), config)
    shake(ours)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(ours), **FLOAT32)
    assert not torch.allclose(logits(ours), logits(base), **FLOAT32)
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "theirs", "again")
    torch.testing.assert_close(logits(again), logits(ours), **FLOAT32)
    with disable_adapters(again):
        assert torch.equal(logits(again), logits(base))


@pytest.mark.parametrize("case", CASES)
def test_switched_merged_unmerged_and_unloaded(case: str) -> None:
    model, config = CASES[case]
    base = MODELS[model]()
    ours = ours_on(copy.deepcopy(base), config)
    shake(ours)
    plain, tuned = logits(base), logits(ours)
    ours_on(ours, config, "other")
    torch.testing.assert_close(logits(ours), plain, **FLOAT32)
    shake(ours, "other", seed=2)
    other = logits(ours)
    assert not torch.allclose(other, tuned, **FLOAT32)
    set_adapter(ours, "default")
    assert torch.equal(logits(ours), tuned)
    with disable_adapters(ours):
        assert torch.equal(logits(ours), plain)
    if case != "tokens of positions":  # the positions of all rows are looked up as one
        with torch.no_grad(), adapters_for_rows(ours, ["default", "other"]):
            rows = ours(IDS).logits
        torch.testing.assert_close(rows, torch.stack([tuned[0], other[1]]), **FLOAT32)
    merge(ours)
    torch.testing.assert_close(logits(ours), tuned, **FLOAT32)
    with disable_adapters(ours):
        assert torch.equal(logits(ours), plain)
    unmerge(ours)
    assert torch.equal(logits(ours), tuned)
    twin = copy.deepcopy(ours)
    unload(twin, merge=True)
    torch.testing.assert_close(logits(twin), tuned, **FLOAT32)
    assert twin.state_dict().keys() == base.state_dict().keys()
    unload(ours)
    assert torch.equal(logits(ours), plain)
    for name, tensor in base.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
