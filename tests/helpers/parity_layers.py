"""The columns of the parity matrix: small models with layers of one kind, and whole models with tied embeddings."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from minilora.nf4.linear import NF4Linear


@dataclass(frozen=True)
class Layers:
    """A small model with layers of one kind, an input for it, and the paths of those layers."""

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    targets: tuple[str, ...] = ("0", "2")  # two layers of different shapes


def linear(Linear: Callable[[int, int], nn.Module]) -> Layers:
    # Inputs in whole blocks of 64: where a block crosses rows, bitsandbytes 0.50 takes another's scale on a CPU.
    return Layers(lambda: nn.Sequential(Linear(64, 128), nn.Tanh(), Linear(128, 32)), lambda: torch.randn(4, 16, 64))


def gpt2_linear(inputs: int, outputs: int) -> nn.Module:
    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.weight, std=inputs**-0.5)  # the size of what nn.Linear draws, not GPT-2's 0.02
    nn.init.normal_(layer.bias, std=0.1)
    return layer


def conv(dim: int, **options: Any) -> Layers:
    Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    options = {"stride": 2, "padding": 1} | options
    return Layers(
        lambda: nn.Sequential(Conv(8, 12, 3, **options), nn.Tanh(), Conv(12, 8, 3, padding=1, bias=False)),
        lambda: torch.randn(2, 8, *[(24, 9, 5)[dim - 1]] * dim),
    )


LAYERS: dict[str, Layers] = {
    "Linear": linear(nn.Linear),
    "Linear, no bias": linear(partial(nn.Linear, bias=False)),
    "Conv1D (GPT-2)": linear(gpt2_linear),
    "Embedding": Layers(
        lambda: nn.Sequential(nn.Embedding(40, 32), nn.Tanh(), nn.Linear(32, 24)),
        lambda: torch.randint(0, 40, (4, 16)),
        targets=("0",),
    ),
    "Conv1d": conv(1),
    "Conv2d": conv(2),
    "Conv3d": conv(3),
    "Conv2d, groups": conv(2, groups=2),
    "Conv2d, dilated": conv(2, dilation=2),
    "Conv2d, circular": conv(2, padding_mode="circular"),
}

SHAPES: dict[str, Any] = {
    "Llama": LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
    ),
    "GPT-2": GPT2Config(vocab_size=48, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0),
}
EMBEDDINGS = {"Llama": "model.embed_tokens", "GPT-2": "transformer.wte"}


def language_model(name: str, tied: bool, on: str) -> Layers:
    """A whole model, with the adapter on its head, its embedding, or both."""

    def make() -> nn.Module:
        config = copy.deepcopy(SHAPES[name])
        config.tie_word_embeddings = tied
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():  # far from uniform softmaxes
            nn.init.normal_(parameter, std=0.3)
        return model

    paths = {"head": "lm_head", "embedding": EMBEDDINGS[name]}
    return Layers(make, lambda: torch.randint(0, 48, (4, 12)), tuple(paths[end] for end in on.split(" + ")))


ENDS = ("head", "embedding", "head + embedding")
MODELS: dict[str, Layers] = {
    f"{name}, {'tied' if tied else 'untied'}, {on}": language_model(name, tied, on)
    for name in SHAPES
    for tied in (False, True)
    for on in ENDS
}


def in_4_bits(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy of the model with every linear layer replaced."""
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(path, make(layer))
    model.is_loaded_in_4bit = True  # by which PEFT knows what it has before it
    return model


def bitsandbytes_linear(layer: nn.Linear) -> nn.Module:
    theirs = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
    )
    theirs.load_state_dict(layer.state_dict())
    theirs.support_avx512bf16_for_cpu = False  # it would pack the weight anew in eval mode, and train no more
    return theirs.to("cpu")  # .to() quantizes


def dequantized(layer: nn.Linear) -> nn.Module:
    dense = copy.deepcopy(layer)
    dense.weight.data = NF4Linear.from_linear(layer).dequantize(torch.float32)
    return dense
