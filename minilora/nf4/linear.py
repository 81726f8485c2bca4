"""NF4Linear: a frozen linear layer whose weight is stored in 4 bits (QLoRA, arXiv 2305.14314, section 3, equation 5).

               W' = dequantize(codes, absmax)        for each product anew (inside a checkpoint: see weight_to_save)
    forward    y = x W'^T + bias (+ add)
    backward   dL/dx = dL/dy W'        dL/dadd = dL/dy        nothing for W: it is frozen

Blocks run over the flattened weight: where in_features is not a multiple of the block size they straddle rows.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import InputError
from minilora.nf4.codec import NESTED_BLOCK_SIZE, QuantizedTensor, dequantize, make_tables
from minilora.nf4.dispatch import fused_product, quantize_weight, temporary_weight, weight_to_save


class NF4Linear(nn.Module):
    """y = x W^T + bias, with W (out_features, in_features) frozen in NF4.

    The constructor leaves the weight zero, for a state dict to fill; `from_linear` and `from_quantized` fill it.

    The packed weight is in plain buffers, so state_dict, .to(), deepcopy and safetensors work as for any layer:
    weight: uint8 (ceil(in_features * out_features / 2),), absmax, nested_absmax and offset as in QuantizedTensor.
    A dtype given to .to() (or .half(), ...) goes to the bias alone; the statistics stay as they were quantized.

    torch's nn.TransformerEncoderLayer reads weights in evaluation mode instead of calling its layers: where it has one
    in 4 bits, torch.backends.mha.set_fastpath_enabled(False) makes it call them.

    For a CUDA graph, call the layer once before the capture, with as many rows: Triton compiles its kernels, and cuBLAS
    takes its memory, when they are first called.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether a bias, frozen too, is added.
        block_size: weights that share an absmax, a power of two from 32 to 4096.
        double_quant: whether the absmax are quantized to 8 bits as well.
        compute_dtype: in which W is dequantized and multiplied, a floating-point dtype; None takes x's.
        device: of the buffers and the bias.

    Raises:
        InputError: if compute_dtype is not a floating-point dtype.

    Source: QLoRA, arXiv 2305.14314, section 3, equation 5.
    """

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
        if compute_dtype is not None and not getattr(compute_dtype, "is_floating_point", False):
            raise InputError(f"compute_dtype {compute_dtype!r} is not a floating-point dtype, such as torch.bfloat16")
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.compute_dtype = block_size, compute_dtype
        n = in_features * out_features
        n_blocks = -(-n // block_size)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.register_buffer("weight", zeros(-(-n // 2), dtype=torch.uint8))
        self.register_buffer("absmax", zeros(n_blocks, dtype=torch.uint8 if double_quant else torch.float32))
        self.register_buffer("nested_absmax", zeros(-(-n_blocks // NESTED_BLOCK_SIZE)) if double_quant else None)
        self.register_buffer("offset", zeros() if double_quant else None)
        self.bias = nn.Parameter(zeros(out_features), requires_grad=False) if bias else None

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
        """The layer in 4 bits; its bias is shared, not quantized. Raises InputError as nf4.quantize does."""
        q = quantize_weight(linear.weight, block_size, double_quant, name=name)
        return cls.from_quantized(q, linear.bias, compute_dtype)

    @classmethod
    def from_quantized(
        cls, q: QuantizedTensor, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> "NF4Linear":
        """A layer around the tensors of ``q``, which must be a matrix; nothing is copied."""
        if len(q.shape) != 2 or q.nested_block_size != NESTED_BLOCK_SIZE:
            raise InputError(
                f"NF4Linear takes a matrix with nested blocks of {NESTED_BLOCK_SIZE}, "
                f"not shape {q.shape} with nested blocks of {q.nested_block_size}"
            )
        out_features, in_features = q.shape
        options: dict[str, Any] = {"block_size": q.block_size, "double_quant": q.offset is not None}
        layer = cls(in_features, out_features, compute_dtype=compute_dtype, device="meta", **options)
        layer.weight, layer.absmax, layer.nested_absmax, layer.offset = q.codes, q.absmax, q.nested_absmax, q.offset
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        make_tables(layer.weight)
        return layer

    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor over the same memory."""
        shape, dtype = (self.out_features, self.in_features), self.compute_dtype or torch.float32
        return QuantizedTensor(self.weight, self.absmax, shape, dtype, self.block_size, self.nested_absmax, self.offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out_features, in_features) in ``dtype``, by default the compute_dtype, or else float32."""
        return dequantize(self.quantized(), dtype)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x W^T + bias (+ add): (..., in_features) to (..., out_features), in x's dtype.

        ``add`` (..., out_features) is what an adapter computed from the same x; where x, add and the compute dtype
        agree, the product accumulates onto it and the sum is rounded once.
        """
        if not x.is_floating_point():
            raise InputError(
                f"NF4Linear({self.in_features}, {self.out_features}) multiplies floating-point numbers, and x is"
                f" {x.dtype}: a model that casts it to the layer's weight.dtype, as T5 before its wo, cannot have that"
                " layer in 4 bits; keep it whole"
            )
        if self.bias is not None:
            bias = self.bias.to(x.dtype)
            add = bias.expand(*x.shape[:-1], -1) if add is None else add + bias
        q, dtype = self.quantized(), self.compute_dtype or x.dtype
        W = weight_to_save(q, dtype) if dtype == x.dtype and x.requires_grad else q
        if isinstance(W, Tensor):
            return linear_onto(add, x, W).to(x.dtype)  # which autocast may have made another
        y: Tensor = _NF4Product.apply(x, add, q, dtype, False)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        statistics = {"absmax": self.absmax, "nested_absmax": self.nested_absmax, "offset": self.offset}
        super()._apply(fn, recurse)
        for name, before in statistics.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))  # follow to the device, keep the exact values
        make_tables(self.weight)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, double_quant={self.offset is not None}, "
            f"compute_dtype={self.compute_dtype}"
        )


# --- products -------------------------------------------------------------------------------------------------------


class _NF4Product(torch.autograd.Function):
    """x W^T (+ add), or with ``transpose`` x W: each is the other's gradient, so this is its own backward.

    W is dequantized for the product at hand. The graph holds the layer's packed buffers and nothing else.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, add: Tensor | None, q: QuantizedTensor, dtype: torch.dtype, transpose: bool
    ) -> Tensor:
        ctx.q, ctx.dtype, ctx.transpose = q, dtype, transpose
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        out_features = q.shape[1] if transpose else q.shape[0]
        add_rows = None if add is None else add.reshape(-1, out_features)
        if add_rows is None or add_rows.dtype == dtype == x.dtype:
            y = product(rows, q, add_rows, transpose=transpose).to(x.dtype)
        else:
            y = product(rows, q, transpose=transpose).to(x.dtype) + add_rows.to(x.dtype)
        return y.view(*x.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _NF4Product.apply(grad_y, None, ctx.q, ctx.dtype, not ctx.transpose)
        return grad_x, grad_y if ctx.needs_input_grad[1] else None, None, None, None


def product(
    rows: Tensor,
    W: Tensor | QuantizedTensor,
    add: Tensor | None = None,
    *,
    transpose: bool = False,
    overwrite: bool = False,
) -> Tensor:
    """rows W^T (+ add), or with ``transpose`` rows W (+ add), all in one dtype and without a graph.

    rows (M, in_features), W (out_features, in_features) dense or in NF4, add (out_features,) or (M, out_features);
    with ``transpose`` in and out change places. A GEMM accumulates onto add and rounds once; with ``overwrite`` add, of
    the result's shape, may become the result.
    """
    if isinstance(W, QuantizedTensor):
        y = fused_product(rows, W, transpose, None if transpose else add)
        if y is not None:
            return y.add_(add) if transpose and add is not None else y
        W = temporary_weight(W, rows.dtype)
    matrix = W if transpose else W.T
    if add is None:
        return rows @ matrix
    return add.addmm_(rows, matrix) if overwrite else torch.addmm(add, rows, matrix)


def product_with_low_rank(
    rows: Tensor, W: Tensor | QuantizedTensor, bias: Tensor | None, xA: Tensor, B: Tensor
) -> Tensor:
    """bias + xA B^T + rows W^T, all in one dtype and without a graph: the small terms first, rounded once at the end.

    rows (M, in_features), W (out_features, in_features) dense or in NF4, xA (M, r), B (out_features, r).
    """
    if isinstance(W, QuantizedTensor):
        y = fused_product(rows, W, False, bias, xA, B)
        if y is not None:
            return y
    return product(rows, W, F.linear(xA, B, bias), overwrite=True)


def linear_onto(add: Tensor | None, x: Tensor, W: Tensor) -> Tensor:
    """`add + x W^T` as one GEMM that starts from `add`: accumulated in float32, rounded once.

    add: None, (out,) or (…, out); x: (…, in); W: (out, in); returns (…, out) in their common dtype.
    """
    if add is None or add.dim() == 1:
        return F.linear(x, W, add)
    rows = torch.addmm(add.reshape(-1, add.shape[-1]), x.reshape(-1, x.shape[-1]), W.T)
    return rows.view(add.shape)
