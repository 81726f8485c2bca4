"""NF4Linear: a frozen linear layer whose weight rests in 4 bits, and its autograd (QLoRA, arXiv 2305.14314, equation 5)."""

from typing import Any

import torch
from torch import Tensor, nn

from minilora.nf4 import QuantizedTensor, dequantize, quantize


class _NF4Product(torch.autograd.Function):
    """y = x W^T (+ add), W dequantized in the forward and again in the backward, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Tensor | None, q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        ctx.q, ctx.dtype, ctx.add_dtype = q, dtype, None if add is None else add.dtype
        W = dequantize(q, dtype)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        y = rows @ W.T if add is None else torch.addmm(add.reshape(-1, W.shape[0]).to(dtype), rows, W.T)
        return y.to(x.dtype).view(*x.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x = grad_add = None
        if ctx.needs_input_grad[0]:
            W = dequantize(ctx.q, ctx.dtype)
            grad_x = (grad.reshape(-1, W.shape[0]).to(ctx.dtype) @ W).to(grad.dtype)
            grad_x = grad_x.view(*grad.shape[:-1], W.shape[1])
        if ctx.needs_input_grad[1]:
            grad_add = grad.to(ctx.add_dtype)
        return grad_x, grad_add, None, None


class NF4Linear(nn.Module):
    """y = x W^T + bias with W frozen in NF4."""

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.compute_dtype = block_size, compute_dtype
        n = in_features * out_features
        blocks = -(-n // block_size)
        self.register_buffer("weight", torch.zeros(-(-n // 2), dtype=torch.uint8, device=device))
        dtype = torch.uint8 if double_quant else torch.float32
        self.register_buffer("absmax", torch.zeros(blocks, dtype=dtype, device=device))
        nested = torch.zeros(-(-blocks // 256), device=device) if double_quant else None
        self.register_buffer("nested_absmax", nested)
        self.register_buffer("offset", torch.zeros((), device=device) if double_quant else None)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        double_quant: bool = True,
        block_size: int = 64,
        compute_dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> "NF4Linear":
        """Quantize an nn.Linear; its bias is kept as it is."""
        q = quantize(linear.weight, block_size, double_quant, name=name)
        return cls.from_quantized(q, linear.bias, compute_dtype)

    @classmethod
    def from_quantized(
        cls, q: QuantizedTensor, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> "NF4Linear":
        """Take the tensors of ``q`` as they are."""
        layer = cls(
            q.shape[1],
            q.shape[0],
            block_size=q.block_size,
            double_quant=q.offset is not None,
            compute_dtype=compute_dtype,
            device="meta",
        )
        layer.weight, layer.absmax = q.codes, q.absmax
        layer.nested_absmax, layer.offset = q.nested_absmax, q.offset
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor that shares the buffers' memory."""
        shape = (self.out_features, self.in_features)
        dtype = self.compute_dtype or torch.float32
        return QuantizedTensor(
            self.weight, self.absmax, shape, dtype, self.block_size, self.nested_absmax, self.offset
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out_features, in_features) in ``dtype``."""
        return dequantize(self.quantized(), dtype)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x (..., in_features) -> (..., out_features) in x's dtype; ``add`` is accumulated inside the GEMM."""
        if self.bias is not None:
            bias = self.bias.to(x.dtype)
            add = bias.expand(*x.shape[:-1], -1) if add is None else add + bias
        return _NF4Product.apply(x, add, self.quantized(), self.compute_dtype or x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "NF4Linear":
        statistics = {"absmax": self.absmax, "nested_absmax": self.nested_absmax, "offset": self.offset}
        super()._apply(fn, recurse)
        for name, before in statistics.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:  # .half(), .to(bfloat16): the device only
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, double_quant={self.offset is not None}"
        )
