"""Activations that rest in CPU memory: of a checkpointed model, what stands on the GPU from forward to backward.

    forward     block 0    block 1    block 2    …        backward   …    block 2     block 1     block 0
    copies        x₀ →       x₁ →       x₂ →                            ← x₁        ← x₀
                     to the CPU, beside the block                    to the GPU, one block ahead

Gradient checkpointing keeps each block's input x (tokens x hidden): for 32 blocks of 16384 tokens x 4096 in bfloat16,
4 GB. Here each is copied to pinned memory on a stream of its own while the block computes with it, and comes back
while the block above it computes its gradient. A block's work grows with hidden², the copy with hidden: the larger the
model, the better the copies hide. On a GPU there are then two inputs at a time. Copies are exact, and so is the
gradient.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["ActivationOffload"]


@dataclass
class _Kept:
    """A block's input in both places; `on_device` is None while only the CPU has it."""

    index: int
    on_cpu: Tensor
    on_device: Tensor | None
    copied: torch.cuda.Event | None = None  # set once the last copy, either way, is done


class ActivationOffload:
    """Of one forward pass and its backward; blocks are met in order, and in the reverse order on the way back.

    On a device other than CUDA, the CPU itself among them, copies are made in place of the streams: the same
    gradients, and nothing gained.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept: list[_Kept] = []

    def keeping(self, x: Tensor) -> saved_tensors_hooks:
        """Inside the `with`, autograd keeps the block's input x in CPU memory: `checkpoint(block, x, …)` stands there.

        Of the other arguments, which all blocks share, nothing is moved.
        """
        return saved_tensors_hooks(partial(self._pack, x.data_ptr()), self._unpack)

    def _pack(self, address: int, tensor: Tensor) -> Any:
        if tensor.data_ptr() != address:
            return tensor
        if self._kept:
            self._let_go(self._kept[-1])
        on_cpu = torch.empty_like(tensor, device="cpu", pin_memory=self._stream is not None, requires_grad=False)
        kept = _Kept(len(self._kept), on_cpu, tensor.detach())
        self._copy(kept.on_cpu, tensor.detach(), kept)
        self._kept.append(kept)
        return kept

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        x = self._on_device(kept)
        self._let_go(kept)
        if kept.index > 0:
            self._on_device(self._kept[kept.index - 1])  # which is needed next
        return x

    def _on_device(self, kept: _Kept) -> Tensor:
        """The input, which a copy may still be on its way to."""
        if kept.on_device is None:
            # Memory of the stream that computes, which alone may free it: nothing waits for the CPU to notice.
            kept.on_device = torch.empty_like(kept.on_cpu, device=self._device)
            self._copy(kept.on_device, kept.on_cpu, kept)
        return kept.on_device

    def _let_go(self, kept: _Kept) -> None:
        """Forget the input on the device, once what computes there has waited for the copy."""
        if kept.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(kept.copied)
        kept.on_device = None

    def _copy(self, to: Tensor, of: Tensor, kept: _Kept) -> None:
        """On the stream of the copies, after all that computes now."""
        if self._stream is None:
            to.copy_(of)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(of, non_blocking=True)
            kept.copied = self._stream.record_event()
