"""What a model computes with now, layer by layer: its weights with the active adapters merged, dense, one at a time.

W' = W + Σ s·BA over the active adapters, in float32, W dequantized where it is in NF4. Every writer of whole models
takes its tensors from here; no more than one layer's are in memory beside the model.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.adapted_module import AdaptedModule
from minilora.adapters.adapter import Adapter
from minilora.adapters.layer import AdaptedLayer
from minilora.errors import InputError
from minilora.models import Transformer
from minilora.nf4 import NF4Linear


def layers_with_weights(model: Transformer) -> dict[str, nn.Module]:
    """The modules that hold weights, by path; a head that is nothing but the embedding is left out."""
    layers = dict(_walk("", model))
    embedding, head = layers["model.embed_tokens"], layers["lm_head"]
    (of_embedding, on_embedding), (of_head, on_head) = layer_and_acting(embedding), layer_and_acting(head)
    if of_head.weight is of_embedding.weight and (
        not (on_embedding or on_head) or torch.equal(weight_and_bias(head)[0], weight_and_bias(embedding)[0])
    ):
        del layers["lm_head"]
    return layers


def _walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers from here on, those with an AdaptedModule as the plain ones that it computes with now."""
    if isinstance(module, AdaptedModule):
        module = module.folded() if module.acting_adapters() else module.layer_in_use()
    if isinstance(module, AdaptedLayer) or hasattr(module, "weight"):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _walk(f"{path}.{name}".lstrip("."), child)


def dense_tensors(path: str, layer: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """weight, and bias if there is one, merged and dense, on the CPU."""
    W, bias = weight_and_bias(layer)
    tensors = {f"{path}.weight": W.to("cpu", dtype).contiguous()}
    if bias is not None:
        tensors[f"{path}.bias"] = bias.detach().to("cpu", dtype)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            what = name.removeprefix(f"{path}.")
            raise InputError(f"{path}: the {what} to save has NaN or infinity in {dtype}; nothing was saved")
    return tensors


def layer_and_acting(layer: Any) -> tuple[Any, list[Adapter]]:
    """The layer without adapters, and those that its forward applies to it now."""
    return (layer.layer_in_use(), layer.acting_adapters()) if isinstance(layer, AdaptedLayer) else (layer, [])


@torch.no_grad()
def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """What the layer's forward computes with now, in the layer's own orientation: W' = W + Σ s·BA, in float32."""
    base, adapters = layer_and_acting(layer)
    if adapters:
        W, bias = layer.merged_weight()
        return layer.kind.stored(W), bias
    W = base.dequantize(torch.float32) if isinstance(base, NF4Linear) else base.weight
    return W, getattr(base, "bias", None)
