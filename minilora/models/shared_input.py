"""Layers of a block that do better when they know of each other.

    q, k, v = project(x, q_proj, k_proj, v_proj)        they share x: one read of it, where three calls make three
    y = project_swiglu(gate, up, down_proj)             its input is silu(gate) · up: that product need not be saved

A layer that has a better way offers it by a method, which may decline:

    part = layer.shared_part(x)                         what it would compute for x, as data; None: just call me
    ys = part.together(x, [part, ...])                  what all of them compute
    y = layer.after_swiglu(gate, up)                    its output for silu(gate) · up; None: just call me with it

Any other layer is called by itself, and so is one with hooks, which only a call fires.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from minilora.models.swiglu import swiglu
from minilora.torch_helpers import is_plainly_called


class Part(Protocol):
    """What one layer would compute."""

    def together(self, x: Tensor, parts: Sequence[Any]) -> Sequence[Tensor]:
        """The outputs of all parts for the input x (…, in)."""


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """[layer(x) for layer in layers]; x as every one of the layers takes it."""
    parts: list[Part | None] = [_ask(layer, "shared_part", x) for layer in layers]
    offered = [part for part in parts if part is not None]
    if len(offered) < 2:
        return [layer(x) for layer in layers]
    together = iter(offered[0].together(x, offered))
    return [layer(x) if part is None else next(together) for layer, part in zip(layers, parts, strict=True)]


def project_swiglu(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    """layer(silu(gate) · up); gate and up (…, in)."""
    y: Tensor | None = _ask(layer, "after_swiglu", gate, up)
    return layer(swiglu(gate, up)) if y is None else y


def _ask(layer: nn.Module, offer: str, *args: Tensor) -> Any:
    """What the layer answers, or None where it has no such method, or must be called."""
    method: Callable[..., Any] | None = getattr(type(layer), offer, None)
    return None if method is None or not is_plainly_called(layer) else method(layer, *args)
