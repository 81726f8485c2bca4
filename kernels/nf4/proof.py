"""Is a kernel right on the device at hand? It runs on small random weights, and is compared with PyTorch.

    dequantize, quantize      equal bytes
    gemv, matmul, backward    |y − y₆₄| ≤ u |y₆₄| + s (|x| |W|)       y₆₄: float64, on the dequantized W

u is the rounding of the result to its dtype, s what sums in float32 may be off in any order. The weights have more
than 256 blocks, so that nested absmax counts, rows of different sizes, so that a wrong absmax shows, and also numbers
of rows that no tile divides. A kernel's result is made before PyTorch's: memory left by that cannot pass for it.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from minilora.nf4 import codec

from . import ops

UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SUM = {torch.float32: 2**-18, torch.float16: 2**-14, torch.bfloat16: 2**-14}
ROWS = {"gemv": (1,), "matmul": (3, 17, 65), "backward": (3, 17, 65)}  # of x: one number for each tile
# What is added by the kernel that multiplies with so many rows of W: of which shape, and a LoRA of which rank.
ADDED = {128: (("", 0), ("bias", 0), ("", 16), ("bias", 16)), 130: (("rows", 5),)}


def fault(kernel: str, dtype: torch.dtype, block_size: int, double_quant: bool, device: torch.device) -> str:
    """What is wrong with the kernel of this folder's file `kernel`; "" where every comparison holds."""
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), dtype=torch.float32, device=device)
    compare = {"quantize": _quantized, "dequantize": _dequantized}.get(kernel, _products)
    return next(filter(None, compare(kernel, draw, dtype, block_size, double_quant)), "")


def _quantized(kernel: str, draw: partial[Tensor], dtype: torch.dtype, size: int, double: bool) -> Iterator[str]:
    for N in ADDED:
        w = (draw(N, 3 * size) * draw(N, 1)).view(-1)
        w[: 2 * size] = 0  # a block of zeros, and one of ties
        w[size : size + 15], w[size + 15] = codec.midpoints(codec.code(w.device)), 1
        ours, theirs = ops.nf4_quantize(w.to(dtype), size), codec.quantize_whole_blocks(w.to(dtype), size)
        for name, a, b in zip(("codes", "absmax"), ours, theirs, strict=True):
            yield unequal_bytes(a, b) and f"{name} of {w.numel()} weights: {unequal_bytes(a, b)}"


def _dequantized(kernel: str, draw: partial[Tensor], dtype: torch.dtype, size: int, double: bool) -> Iterator[str]:
    for N, K in ((128, 3 * size), (130, 3 * size), (131, 2 * size + 5)):  # the last block of the last is not whole
        q = codec.quantize(draw(N, K) * draw(N, 1), size, double)
        W = ops.nf4_dequantize(*ops.packed(q), dtype)
        unequal = unequal_bytes(W, codec.dequantize(q, dtype))
        yield unequal and f"{N}x{K}: {unequal}"


def _products(kernel: str, draw: partial[Tensor], dtype: torch.dtype, size: int, double: bool) -> Iterator[str]:
    for N, K in ((128, 9 * size), (130, 3 * size)):
        q = codec.quantize(draw(N, K) * draw(N, 1) / K**0.5, size, double)
        W = codec.dequantize(q, torch.float32 if kernel == "gemv" else dtype).double()  # gemv does not round W
        for M in ROWS[kernel]:
            if kernel == "backward":
                g = draw(M, N).to(dtype)
                y = ops.nf4_backward(g, *ops.packed(q))
                off = times_the_rounding(y, g.double() @ W, g.double().abs() @ W.abs(), dtype)
                yield off and f"{M} rows times {N}x{K}: {off}"
                continue
            for kind, r in ADDED[N]:
                x, xA, B = draw(M, K).to(dtype), draw(M, r).to(dtype), draw(N, r).to(dtype)
                add = draw(*((M, N) if kind == "rows" else (N,))).to(dtype) if kind else None
                y = ops.nf4_matmul(x, *ops.packed(q), add, *((xA, B) if r else (None, None)))
                wide_x, wide_W, term = torch.cat([x, xA], 1).double(), torch.cat([W, B.double()], 1), 0 * y.double()
                if add is not None:
                    term = add.double().expand(M, N)
                magnitude = wide_x.abs() @ wide_W.abs().T + term.abs()
                off = times_the_rounding(y, wide_x @ wide_W.T + term, magnitude, dtype)
                yield off and f"{M} rows times {N}x{K} transposed, added: {kind or 'nothing'}, LoRA of rank {r}: {off}"


def unequal_bytes(ours: Tensor, theirs: Tensor) -> str:
    """How many bytes differ, in words; "" if none."""
    n = int((ours.view(torch.uint8) != theirs.view(torch.uint8)).sum())
    return f"{n} of {theirs.nbytes} bytes differ from PyTorch's" if n else ""


def times_the_rounding(y: Tensor, exact: Tensor, magnitude: Tensor, dtype: torch.dtype) -> str:
    """By how many times what rounding explains y is off, in words; "" if rounding does. magnitude: |x| |W|."""
    worst = ((y - exact).abs() / (UNIT[dtype] * exact.abs() + SUM[dtype] * magnitude)).max().item()
    return "" if worst <= 1 else f"off by {worst:.3g} times what rounding explains"  # nan, too
