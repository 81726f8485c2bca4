"""A model with an adapter of minilora beside the same with PEFT's, compared through the keys of PEFT's file."""

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from helpers.adapters import FLOAT32, IDS, logits
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from minilora.adapters.attach import adapters_named, add_adapter, disable_adapters
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.formats.peft import load_adapter, save_adapter


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Conv1D layers with biases that are not zero, LayerNorms, learnt positions, a tied head."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


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
        name.replace(".modules_to_save.default.", ".").replace(".default", "").replace("_vector.weight", "_vector"): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def shake(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Move every number that the adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model, name).values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def assert_same_logits_and_gradients(ours: nn.Module, theirs: peft.PeftModel) -> None:
    """With minilora's values in PEFT's parameters, both compute the same and train the same by the same gradients."""
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


def check_both_ways(ours: nn.Module, base: nn.Module, folder: Path) -> None:
    """PEFT loads what minilora has saved, and minilora what PEFT has saved of that: the logits are the same."""
    save_adapter(ours, folder / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(ours), **FLOAT32)
    theirs.save_pretrained(folder / "theirs")
    load_adapter(again := copy.deepcopy(base), folder / "theirs", "again")
    torch.testing.assert_close(logits(again), logits(ours), **FLOAT32)
    with disable_adapters(again):
        assert torch.equal(logits(again), logits(base))
