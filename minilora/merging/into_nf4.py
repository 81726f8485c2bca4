"""Two merges that a model in 4 bits survives: rounding that accounts for the inputs, and one LoRA of a small rank.

                          W' = W + ΔW     the base W in NF4, the change too small to be seen by rounding to nearest
    merge_to_nf4          Q  ≈ W'         codes chosen so that ‖X (Q − W')ᵀ‖ is small: minilora/nf4/rounding.py
    merge_to_lora         W + BA ≈ W'     W keeps its bits; BA is the best fit of rank r to the change

The first needs batches of data and gives plain NF4 layers. The second needs none and leaves a LoRA to apply, which
loses less. docs/merging.md has both measured, beside requantizing.
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from minilora.adapters import (
    AdaptedLayer,
    LoRA,
    LoRAConfig,
    Part,
    adapted_layers,
    attach,
    build_adapters,
    output_head,
    refuse_merged,
    unmerge,
)
from minilora.errors import InputError
from minilora.nf4 import NF4Linear, QuantizedTensor, quantize_weight, round_to_nf4
from minilora.progress import progress_bar, with_progress
from minilora.torch_helpers import randomized_svd
from minilora.training import language_model_loss
from minilora.variants.calibration import Forward, as_list, input_moments

OVERSAMPLING, ITERATIONS = 8, 4  # of the randomized SVD: an adapter's change has few large singular values


@torch.no_grad()
def merge_to_nf4(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward = language_model_loss,
    max_moments_bytes: int = 2 << 30,
) -> None:
    """Merge the active adapters of linear layers into 4 bits: each becomes an NF4Linear that computes nearly W' x.

    `unmerge` undoes it, bit for bit, and `unload(model, merge=True)` makes it final, as after `merge`. A layer in NF4
    keeps its absmax and its block_size; a dense linear layer is quantized with `load`'s settings. Embeddings,
    convolutions and the output head become dense, as `merge` has them.

    Args:
        model: The model with the adapters, not merged.
        batches: Data like what the adapters were trained on, see variants/calibration/batches.py; some thousand tokens
            do.
        forward: Runs the model on a batch, as the default `language_model_loss(model, batch)` does.
        max_moments_bytes: Most memory for the inputs' second moments, which take 4·in² bytes a layer. Where all of
            them need more, the batches are gone through several times, each time for the next layers.

    Raises:
        InputError: for a model that is merged or without active adapters; naming the layer where W' or an input is not
            finite, or that no input reached. The model is then as it was.

    Source: GPTQ, arXiv 2210.17323, and QuantEase, arXiv 2309.01885; W' takes the place of W.
    """
    layers, batches = _layers_to_merge(model), as_list(batches)
    head = output_head(model)
    to_round = {}
    try:
        for path, layer in layers.items():
            is_nf4 = isinstance(layer.base_layer, NF4Linear)
            if layer.changes_weight() and (is_nf4 or (layer.kind.is_linear and path != head)):
                to_round[path] = layer
            elif is_nf4:  # a bias alone changes
                layer.put_in_place(_in_nf4(layer, layer.base_layer.quantized(), layer.merged_weight()[1]))
            else:
                layer.merge(path)
        with progress_bar("Rounding to NF4", len(to_round), "layers") as advance:
            for paths in _groups(to_round, max_moments_bytes):
                moments = input_moments(model, paths, batches, forward)
                for path in paths:
                    to_round[path].put_in_place(_rounded(path, to_round[path], moments.pop(path)))
                    advance(1)
    except BaseException:
        unmerge(model)
        raise


def _layers_to_merge(model: nn.Module) -> dict[str, AdaptedLayer]:
    refuse_merged(model)
    layers = {path: layer for path, layer in adapted_layers(model).items() if layer.active_adapters()}
    if not layers:
        raise InputError("the model has no active adapter to merge")
    return layers


def _merged_weight(path: str, layer: AdaptedLayer) -> tuple[Tensor, Tensor | None]:
    W, bias = layer.merged_weight()
    if not all(tensor.isfinite().all() for tensor in (W, bias) if tensor is not None):
        raise InputError(f"{path}: merging {layer.active} gives NaN or infinity; nothing was merged")
    return W, bias


def _groups(layers: dict[str, AdaptedLayer], most_bytes: int) -> Iterator[list[str]]:
    """The paths in order, in groups whose moments take at most so many bytes, but at least one path each."""
    group: list[str] = []
    room = most_bytes
    for path, layer in layers.items():
        size = 4 * layer.kind.in_features**2
        if size > room and group:
            yield group
            group, room = [], most_bytes
        group.append(path)
        room -= size
    if group:
        yield group


def _rounded(path: str, layer: AdaptedLayer, H: Tensor) -> NF4Linear:
    W, bias = _merged_weight(path, layer)
    in_nf4 = isinstance(layer.base_layer, NF4Linear)
    grid = layer.base_layer.quantized() if in_nf4 else quantize_weight(W, name=path)
    return _in_nf4(layer, round_to_nf4(W.float(), grid, H), bias)


def _in_nf4(layer: AdaptedLayer, q: QuantizedTensor, bias: Tensor | None) -> NF4Linear:
    base = layer.base_layer
    dtype = base.compute_dtype if isinstance(base, NF4Linear) else base.weight.dtype
    return NF4Linear.from_quantized(q, bias if bias is None else bias.to(dtype or torch.float32), dtype)


@torch.no_grad()
def merge_to_lora(model: nn.Module, r: int, name: str = "merged") -> dict[str, float]:
    """Fold the active adapters, of any kind, into one new plain LoRA, and make it the active one.

    The base keeps its bits and the old adapters stay, inactive. A = √S Vᵀ and B = U √S of the r largest singular
    values of W' − W, with lora_alpha = r.

    Args:
        model: The model with the adapters, not merged.
        r: The rank of the new LoRA; where it is no less than the adapters' ranks together, nothing is lost.
        name: What the new adapter is called.

    Returns:
        ‖BA − (W' − W)‖ / ‖W' − W‖ of each layer, by its path.

    Raises:
        InputError: for a model that is merged or without active adapters, a name in use, a rank below 1; and naming the
            layer that the adapters train in full, or its bias, which a LoRA cannot hold. The model is then as it was.
    """
    layers = _layers_to_merge(model)
    for path, layer in layers.items():
        if any(isinstance(adapter, Part) for adapter in layer.active_adapters()):
            raise InputError(f"{path}: {layer.active} train it, or its bias, in full, which a LoRA cannot hold")
    config = LoRAConfig(r=r, lora_alpha=r, target_modules=list(layers))
    adapters = build_adapters(model, config, list(layers))
    items = with_progress(layers.items(), len(layers), "Fitting a LoRA", "layers")
    lost = {path: _fit(cast(LoRA, adapters[path]), path, layer) for path, layer in items}
    attach(model, adapters, name)
    return lost


def _fit(adapter: LoRA, path: str, layer: AdaptedLayer) -> float:
    W, bias = _merged_weight(path, layer)
    if bias is not getattr(layer.base_layer, "bias", None):
        raise InputError(f"{path}: {layer.active} change its bias, which a LoRA cannot hold")
    D = (W - layer.kind.weight(layer.base_layer)).flatten(1)
    U, S, Vh = randomized_svd(D.float(), adapter.r + OVERSAMPLING, ITERATIONS)
    k = min(adapter.r, len(S))
    A, B = S[:k, None].sqrt() * Vh[:k], U[:, :k] * S[:k].sqrt()
    adapter.lora_A.zero_().flatten(1)[:k] = A
    adapter.lora_B.zero_().flatten(1)[:, :k] = B
    return ((B @ A - D).norm() / D.norm().clamp(min=torch.finfo(D.dtype).tiny)).item()
