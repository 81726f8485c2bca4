"""(c) y = x W^T for a single row: decoding, one token at a time.

    y[n] = Σ_k x[k] · code[n, k] · absmax[n, k // 64]        in float32 throughout: products, absmax and sum

One row cannot fill a tensor core, and need not: every weight is used once, so the time is that of reading 4.127 bits
a weight, by arithmetic 2.6 µs for 4096² at an H100's 3.35 TB/s. What can spoil that is the work of unpacking: a lookup,
two products and two fused multiply-adds a byte.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.nf4 import QuantizedTensor

from .codes import block_absmax, buffers, decode, split_of

BN, BK = 8, 512  # outputs of one program, and weights of each at a time


@triton.jit
def gemv_kernel(
    x_ptr, codes_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, pairs_ptr, out_ptr,
    N, K, SPLIT,
    BLOCK_SIZE: tl.constexpr, DOUBLE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs, over every SPLIT-th piece of BK weights; BLOCK_SIZE divides BK or the reverse."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    half = tl.arange(0, BK // 2)
    row = n.to(tl.int64) * K
    sums = tl.zeros((BN, BK // 2), tl.float32)
    for k0 in range(part * BK, K, SPLIT * BK):
        inside = (n[:, None] < N) & (k0 + 2 * half[None, :] < K)
        element = row[:, None] + k0 + 2 * half[None, :]
        even, odd = decode(tl.load(codes_ptr + element // 2, mask=inside, other=0), pairs_ptr)
        absmax = block_absmax(
            element // BLOCK_SIZE, inside, absmax_ptr, nested_ptr, offset_ptr, map_ptr, DOUBLE
        )  # fmt: skip
        x_even = tl.load(x_ptr + k0 + 2 * half, mask=k0 + 2 * half < K, other=0.0).to(tl.float32)[None, :]
        x_odd = tl.load(x_ptr + k0 + 2 * half + 1, mask=k0 + 2 * half < K, other=0.0).to(tl.float32)[None, :]
        sums = tl.fma(even * absmax, x_even + tl.zeros_like(sums), sums)
        sums = tl.fma(odd * absmax, x_odd + tl.zeros_like(sums), sums)
    tl.store(out_ptr + part * N + n, tl.sum(sums, axis=1).to(out_ptr.dtype.element_ty), mask=n < N)


def gemv(x: Tensor, q: QuantizedTensor, add: Tensor | None = None) -> Tensor:
    """W x (+ add): x (K,), q of shape (N, K) with K even, add (N,) -> (N,) in x's dtype, rounded once."""
    N, K = q.shape
    split = split_of(triton.cdiv(N, BN), triton.cdiv(K, BK), x.device)
    is_partial = split > 1 or add is not None
    out = torch.empty((split, N), dtype=torch.float32 if is_partial else x.dtype, device=x.device)
    gemv_kernel[(triton.cdiv(N, BN), split)](
        x.contiguous(), *buffers(q), out, N, K, split,
        BLOCK_SIZE=q.block_size, DOUBLE=q.offset is not None, BN=BN, BK=BK,
        num_warps=4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    if not is_partial:
        return out[0]
    y = out.sum(0)
    return (y if add is None else y + add).to(x.dtype)
