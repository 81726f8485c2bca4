"""Layers that take the same input, computed together where they offer to be.

    q, k, v = project(x, q_proj, k_proj, v_proj)        one read of x, where three calls would read it three times
    y = project_swiglu(gate, up, down_proj)             down_proj of silu(gate) · up, without keeping that product

A model knows its layers only as modules. One that can do better in company offers a part:

    part = layer.shared_part(x)                         what it would compute for this x, as data; None: just call me
    ys = part.together(x, gate, [part, ...])            what all of them compute

Any other layer is called by itself, and so is one with hooks, which a call has to fire.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from minilora.activation import swiglu


class Part(Protocol):
    """What one layer would compute."""

    def together(self, x: Tensor, gate: Tensor | None, parts: Sequence[Any]) -> Sequence[Tensor]:
        """The outputs of all parts for the input x (…, in), or silu(gate) · x where there is a gate (…, in)."""


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """[layer(x) for layer in layers]; x as every one of the layers takes it."""
    parts = [shared_part(layer, x) for layer in layers]
    offered = [part for part in parts if part is not None]
    together = iter(offered[0].together(x, None, offered) if offered else ())
    return [layer(x) if part is None else next(together) for layer, part in zip(layers, parts, strict=True)]


def project_swiglu(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    """layer(silu(gate) · up); gate and up (…, in)."""
    part = shared_part(layer, up)
    return layer(swiglu(gate, up)) if part is None else part.together(up, gate, [part])[0]


def shared_part(layer: nn.Module, x: Tensor) -> Part | None:
    """What the layer offers for this x; None where it must be called."""
    offer = getattr(type(layer), "shared_part", None)
    return None if offer is None or not is_plainly_called(layer) else offer(layer, x)


def is_plainly_called(module: nn.Module) -> bool:
    """True if a call of the module does what its class's forward does, and nothing else."""
    return (
        not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__  # accelerate sets one there, which fetches the weight first
    )
