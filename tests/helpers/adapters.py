"""A tiny random Llama, and PEFT beside it."""

import copy
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from minilora.adapters.attach import add_adapter
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora_config import LoRAConfig

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}  # two layers of sums over dozens of terms, in another order than PEFT's
IDS = torch.arange(24).reshape(2, 12) * 7 % 64


def tiny_llama(seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=tied, initializer_range=0.2, attn_implementation="eager")
    return LlamaForCausalLM(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(IDS)
    return output if isinstance(output, Tensor) else output.logits


def peft_model(base: nn.Module, name: str = "default", **config: Any) -> peft.PeftModel:
    return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **config), name).eval()


def peft_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """PEFT's adapter parameters under the keys that `adapter_parameters` uses."""
    ending = f".{name}.weight"
    return {
        key.removeprefix("base_model.model.").removesuffix(ending): parameter
        for key, parameter in model.named_parameters()
        if key.endswith(ending) and ".lora_" in key
    }


def randomize(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Give minilora's or PEFT's adapter random A and B, the same for the same seed and layers."""
    is_peft = isinstance(model, peft.PeftModel)
    parameters = peft_parameters(model, name) if is_peft else adapter_parameters(model, name)
    generator = torch.Generator().manual_seed(seed)
    for key in sorted(parameters):
        parameter = parameters[key]
        value = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
        parameter.data.copy_(0.3 * value)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, **FLOAT32)


def with_adapters(model: nn.Module, configs: dict[str, dict[str, Any]], scale: float = 1.0) -> nn.Module:
    for seed, (name, config) in enumerate(configs.items()):
        add_adapter(model, LoRAConfig(**config), name)
        randomize(model, name, seed)
        for key, parameter in adapter_parameters(model, name).items():
            if key.endswith("lora_A"):
                parameter.data *= scale
    return model.eval()


def peft_with_adapters(model: nn.Module, configs: dict[str, dict[str, Any]], task: str | None = "CAUSAL_LM") -> Any:
    theirs: Any = None
    for seed, (name, config) in enumerate(configs.items()):
        peft_config = peft.LoraConfig(task_type=task, **config)
        if theirs is None:
            theirs = peft.get_peft_model(copy.deepcopy(model), peft_config, name)
        else:
            theirs.add_adapter(name, peft_config)
        randomize(theirs, name, seed)
    return theirs.eval()
