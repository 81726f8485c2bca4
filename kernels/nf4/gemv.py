"""(c), (f) y = x W^T (+ add) (+ x_A B^T) for a single row: decoding, one token at a time.

    y[n] = Σ_b absmax[n, b] · Σ_{k in block b} x[k] · code[n, k]        in float32 throughout
         + add[n] + Σ_r x_A[r] B[n, r]                                  as in matmul.py

One row cannot fill a tensor core, and need not: every weight is used once, so the time is that of reading 4.127 bits
a weight, by arithmetic 2.6 µs for 4096² at an H100's 3.35 TB/s. Unpacking adds to that: in this time the chip can
issue 4.6 instructions a weight, and read its first cache once. This kernel takes 8.8 with single values and 7.0 with
pairs (`python -m minilora.kernels.aot`), so by arithmetic it reaches about half of the bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.nf4.codec import QuantizedTensor

from .codes import block_absmax, buffers, check_rows, decode, split_of
from .matmul import BR

BN, PIECES = 16, 8  # outputs of one program, and pieces of 64 weights of each at a time


@triton.jit(do_not_specialize=["SPLIT"])
def gemv_kernel(
    x_ptr, codes_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, table_ptr, add_ptr, xA_ptr, B_ptr, out_ptr,
    N, K_PIECES, R, SPLIT,
    BLOCK_SIZE: tl.constexpr, DOUBLE: tl.constexpr, ADD: tl.constexpr, LORA: tl.constexpr,
    BN: tl.constexpr, PIECES: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs, over every SPLIT-th group of PIECES pieces; a row has K_PIECES of them."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None, None]
    part = tl.program_id(1)
    row = n.to(tl.int64) * K_PIECES
    half = tl.arange(0, 32)[None, None, :]
    sums = tl.zeros((BN, PIECES, 32), tl.float32)
    for first in range(part * PIECES, K_PIECES, SPLIT * PIECES):
        piece = (first + tl.arange(0, PIECES))[None, :, None]
        inside = (n < N) & (piece < K_PIECES)
        even, odd = decode(tl.load(codes_ptr + (row + piece) * 32 + half, mask=inside, other=0), table_ptr)
        block = (row + piece) // (BLOCK_SIZE // 64)
        absmax = block_absmax(block, inside, absmax_ptr, nested_ptr, offset_ptr, map_ptr, DOUBLE)
        k = piece * 64 + 2 * half
        x_even = tl.load(x_ptr + k, mask=piece < K_PIECES, other=0.0).to(tl.float32)
        x_odd = tl.load(x_ptr + k + 1, mask=piece < K_PIECES, other=0.0).to(tl.float32)
        products = tl.fma(odd, tl.broadcast_to(x_odd, odd.shape), even * x_even)
        sums = tl.fma(products, tl.broadcast_to(absmax, products.shape), sums)
    y = tl.sum(tl.sum(sums, axis=2), axis=1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if part == 0:  # what is added once, is added to the first part
        if ADD:
            y += tl.load(add_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        if LORA:
            for r0 in range(0, R, BR):
                r = r0 + tl.arange(0, BR)
                B = tl.load(B_ptr + n[:, None] * R + r[None, :], mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)
                xA = tl.load(xA_ptr + r, mask=r < R, other=0.0)
                y += tl.sum(B.to(tl.float32) * xA.to(tl.float32)[None, :], axis=1)
    tl.store(out_ptr + part * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


def gemv(
    x: Tensor, q: QuantizedTensor, add: Tensor | None = None, xA: Tensor | None = None, B: Tensor | None = None,
    pairs: bool = False,
) -> Tensor:  # fmt: skip
    """W x (+ add) (+ B xA): x (K,), q of shape (N, K), add (N,), xA (r,), B (N, r) -> (N,) in x's dtype, rounded once.

    add, xA and B as in `matmul`. Raises InputError where the blocks do not lie in rows, or are below 64.
    """
    check_rows(q)
    add, xA, B = (None if part is None else part.contiguous() for part in (add, xA, B))
    N, K = q.shape
    split = split_of(triton.cdiv(N, BN), triton.cdiv(K, 64 * PIECES), x.device)
    R = 0 if B is None else B.shape[1]
    out = torch.empty((split, N), dtype=torch.float32 if split > 1 else x.dtype, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        gemv_kernel[(triton.cdiv(N, BN), split)](
            x.contiguous(), *buffers(q, pairs), add, xA, B, out, N, K // 64, R, split,
            BLOCK_SIZE=q.block_size, DOUBLE=q.offset is not None, ADD=add is not None, LORA=R > 0,
            BN=BN, PIECES=PIECES, BR=BR, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out.sum(0).to(x.dtype) if split > 1 else out[0]
