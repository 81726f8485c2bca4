"""Layers of every kind, with an input; LoRA on one layer, and what it saves for backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from minilora.adapters.layer import LoRALinear
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig
from minilora.nf4.linear import NF4Linear

# float32 sums of a few dozen products, in the layer's order and in that of another routine
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def layers() -> list[Any]:
    torch.manual_seed(0)
    ids, x = torch.tensor([[1, 0, 4], [2, 2, 3]]), torch.randn(2, 3, 64)
    scaled = Gemma3TextScaledWordEmbedding(5, 8, 0, embed_scale=8**0.5)
    return [
        pytest.param(nn.Linear(64, 5), x, id="linear"),
        pytest.param(nn.Linear(64, 5, bias=False), x, id="linear without bias"),
        pytest.param(Conv1D(5, 64), x, id="transformers Conv1D"),
        pytest.param(NF4Linear.from_linear(nn.Linear(64, 5)), x, id="NF4"),
        pytest.param(nn.Embedding(5, 8), ids, id="embedding"),
        pytest.param(nn.Embedding(5, 8, padding_idx=0), ids, id="embedding with padding"),
        pytest.param(scaled, ids, id="Gemma's scaled embedding"),
        pytest.param(nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 7, 7), id="convolution"),
    ]


def lora_layer(base: nn.Module, *names: str, seed: int | None = None, **config: Any) -> LoRALinear:
    """The layer with a LoRA for each name ("default"), all active."""
    layer = LoRALinear(base.requires_grad_(False))
    if seed is not None:
        torch.manual_seed(seed)
    for name in names or ("default",):
        layer.adapters[name] = LoRA(base, LoRAConfig(**config))
        layer.active.append(name)
    return layer


def saved_for_backward(run: Callable[[], Any], *layers: nn.Module) -> int:
    """The numbers that are saved for backward, apart from the layers' own, in storages counted once."""
    own = {t.untyped_storage().data_ptr() for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    del outputs
    return sum(sizes.values())


def rel(a: Tensor, b: Tensor) -> float:
    """|a − b| / |b| in float64, Frobenius norms."""
    return float((a.double() - b.double()).detach().norm() / b.double().detach().norm())
