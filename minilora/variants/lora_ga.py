"""LoRA-GA: start A and B along the gradient of W, so that the first steps go where full fine-tuning would.

    G = dL/dW = U S Vᵀ                               over batches of the data to train on
    A₀ = V[r:2r]ᵀ or V[:r]ᵀ, …                       which vectors: `direction`
    B₀ = the other r columns of U S, times a factor  which factor: `scale`
    ΔW = s·(BA − B₀A₀)                               W stays as it is

    add_adapter(model, LoRAConfig(init_lora_weights="lora_ga", …))
    lora_ga.initialize(model, batches, forward=minilora.language_model_loss)

Wang et al. 2024, arXiv 2407.05000, section 3. Numbers as PEFT's, which multiplies B₀ by S. One is not: for
transformers' Conv1D, PEFT 0.21 takes the number of inputs for out_features in the scale "stable".
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.adapters import (
    AdaptedLayer,
    LoRA,
    disable_adapters,
    kaiming,
    register_initialization,
    weight_to_decompose,
)
from minilora.errors import InputError
from minilora.progress import with_progress
from minilora.torch_helpers import randomized_svd
from minilora.variants.calibration import Forward, as_list, loras_to_start

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclass(frozen=True)
class LoRAGAOptions:
    """lora_ga_config of LoRAConfig."""

    direction: str = "ArB2r"
    """which of the first 2r singular vectors A and B get: A the first r and B the second ("ArB2r"), the other way
    round ("A2rBr"), A the odd and B the even ones ("ArBr"), or both the same r at random ("random")"""
    scale: str = "stable"
    """what B₀ is multiplied by: out_features^¼ / √stable_gamma ("stable"), the ratio of W's largest singular value to
    that of B₀ ("weight_svd"), 1/s for A₀ and B₀ ("gd_scale"), or 1 ("unit")"""
    stable_gamma: float = 16
    """γ of the scale named so"""

    def __post_init__(self) -> None:
        for value, values in ((self.direction, DIRECTIONS), (self.scale, SCALES)):
            if value not in values:
                raise InputError(f"{value!r} is not one of {values}")
        if not self.stable_gamma > 0:
            raise InputError(f"stable_gamma must be above 0, not {self.stable_gamma!r}")


@register_initialization("lora_ga", options=LoRAGAOptions)
def lora_ga(adapter: LoRA, layer: nn.Module) -> None:
    """A random, B = 0, as without LoRA-GA: what stands until `initialize`."""
    W = weight_to_decompose(adapter, layer)
    if 2 * adapter.r > min(W.shape):
        raise InputError(f"needs 2r singular vectors, and the weight {tuple(W.shape)} has too few for r={adapter.r}")
    kaiming(adapter, layer)
    adapter.awaits_data = True


def initialize(
    model: nn.Module,
    batches: Iterable[Any],
    name: str = "default",
    *,
    forward: Forward,
    layers_at_once: int | None = None,
) -> None:
    """Start the adapter from the gradients of the weights over these batches, before the optimizer is made.

    The gradient is that of the mean loss of a batch, averaged over the batches, of the base model in the mode (train or
    eval) in which it is. It is computed from the inputs and the gradients of the outputs of each layer, so that a base
    in 4 bits has one too, in float32 whatever the model's dtype. A layer through which no gradient flows (an expert
    that no token chose) starts as without LoRA-GA.

    Args:
        model: any model with an adapter that has init_lora_weights="lora_ga".
        batches: what the model is to be trained on, read once and kept. `minilora.variants.calibration.batches` says
            what a batch is.
        name: the adapter's.
        forward: gives the loss on a batch, forward(model, batch): `minilora.language_model_loss`, or your own.
        layers_at_once: how many layers' gradients to hold at a time, 4 bytes a weight; fewer than all, the default,
            take as many more passes over the batches.

    Raises:
        InputError: for another adapter's name or initialisation, and for a loss that is not finite or does not depend
            on the layers. The model is then unchanged.

    Source: arXiv 2407.05000, section 3.
    """
    adapters = loras_to_start(model, name, "lora_ga")
    kept = as_list(batches)
    layers = {path: cast(AdaptedLayer, model.get_submodule(path)) for path in adapters}
    n = layers_at_once or len(layers)
    parts = [dict(islice(layers.items(), i, i + n)) for i in range(0, len(layers), n)]
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    with disable_adapters(model):
        for number, part in enumerate(parts, start=1):
            which = f"LoRA-GA, part {number} of {len(parts)}" if len(parts) > 1 else "LoRA-GA"
            shown = with_progress(kept, len(kept), f"{which}, gradients", "batches")
            gradients = weight_gradients(model, part, shown, forward)
            for path, G in with_progress(gradients.items(), len(part), f"{which}, decompositions", "layers"):
                starts[path] = start(adapters[path], part[path].base_layer, G)
    if not starts:
        raise InputError("the loss depends on none of the adapter's layers")
    for path, adapter in adapters.items():
        adapter.start_from(*starts.get(path, (adapter.lora_A, torch.zeros_like(adapter.lora_B))))


@torch.no_grad()
def start(adapter: LoRA, layer: nn.Module, G: Tensor) -> tuple[Tensor, Tensor]:
    """A₀ (r, in) and B₀ (out, r) for the gradient G (out, in)."""
    r, s, options = adapter.r, adapter.scaling, adapter.config.init_options
    U, S, Vh = randomized_svd(G, q=4 * r, niter=4)
    i = torch.arange(2 * r) if options.direction != "random" else torch.randperm(2 * r)
    for_A, for_B = {
        "ArB2r": (i[:r], i[r:]),
        "A2rBr": (i[r:], i[:r]),
        "ArBr": (i[1::2], i[0::2]),
        "random": (i[:r], i[:r]),
    }[options.direction]
    A, B = Vh[for_A], U[:, for_B] * S[for_B]
    if options.scale == "stable":
        B = B * len(B) ** 0.25 / options.stable_gamma**0.5
    elif options.scale == "weight_svd":
        largest = randomized_svd(weight_to_decompose(adapter, layer), q=r, niter=4)[1][0]
        B = B * largest / S[for_B[0]] if S[for_B[0]] > 0 else B
    elif options.scale == "gd_scale":
        A, B = A / s, B / s
    return A, B


def weight_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], forward: Forward
) -> dict[str, Tensor]:
    """dL/dW by path, whether the weights are frozen, in 4 bits, or neither; of all layers that a gradient reaches.

    It is averaged over the times that one reached the layer. Nothing else gets a gradient.
    """
    sums: dict[str, Tensor] = {}
    times: Counter[str] = Counter()
    root = torch.zeros((), requires_grad=True)  # what every layer's output depends on: nothing else may need one

    def record(path: str, x: Tensor, dy: Tensor) -> None:
        G = dy.flatten(0, -2).float().T @ x.flatten(0, -2).float()  # dL/dW = Σ dL/dy xᵀ over tokens
        sums[path] = sums[path].add_(G) if path in sums else G
        times[path] += 1

    def observe(path: str, layer: nn.Module, arguments: tuple[Tensor], y: Tensor) -> Tensor:
        observed: Tensor = _Observed.apply(y, arguments[0], root, partial(record, path))
        return observed

    hooks = [layer.register_forward_hook(partial(observe, path)) for path, layer in layers.items()]
    try:
        with torch.enable_grad():
            for batch in batches:
                loss = forward(model, batch)
                if not math.isfinite(loss.item()):
                    raise InputError(f"the loss on a batch is {loss.item()}: LoRA-GA cannot start from its gradient")
                if loss.requires_grad:
                    torch.autograd.grad(loss, root)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: G.div_(times[path]) for path, G in sums.items()}


class _Observed(torch.autograd.Function):
    """y as it is; in the backward pass `record` gets x, the input of the layer that made y, and dL/dy."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, root: Tensor, record: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)  # like any activation: gradient checkpointing computes it again
        ctx.record = record
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.record(*ctx.saved_tensors, dy)
        return dy, None, torch.zeros(()), None
