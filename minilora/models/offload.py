"""Activation offloading: what gradient checkpointing saves of each block is kept in CPU memory.

    forward     block 0    block 1    block 2    …        backward   …    block 2     block 1     block 0
    copies        x₀ →       x₁ →       x₂ →                            ← x₁        ← x₀
                     to the CPU, beside the block                    to the GPU, one block ahead

Checkpointing saves each block's input x (tokens x hidden): for 32 blocks of 16384 tokens x 4096 in bfloat16, 4 GB. Here
each is copied to pinned memory on a stream of its own while the block computes with it, and copied back while the block
above it computes its gradient, so that two inputs at a time are on the GPU. A block's work grows with hidden², the copy
with hidden: the larger the model, the better the copies hide.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class _Kept:
    """A block's input in both places; `on_device` is None while only the CPU has it."""

    index: int
    on_cpu: Tensor
    on_device: Tensor | None
    copied: torch.cuda.Event | None = None  # set once the last copy, either way, is done


class ActivationOffload:
    """Of one forward pass over the blocks in order, and its backward pass in the reverse order.

    On a device other than CUDA copies are made without a stream: the same gradients, and nothing gained.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept: list[_Kept] = []

    def keeping(self, x: Tensor) -> saved_tensors_hooks:
        """Inside the `with`, `checkpoint(block, x, …)` saves x, and no other argument, in CPU memory."""
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
        """The input, to which a copy may still be under way."""
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
