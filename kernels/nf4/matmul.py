"""(c), (d), (f) y = x W^T (+ add) (+ x_A B^T) for few rows of x, W dequantized in registers.

    y[m, n] = Σ_k x[m, k] · w[n, k]        w = code · absmax, float32, rounded to x's dtype
            + add[m, n] + Σ_r x_A[m, r] B[n, r]      add: a bias, the same for all m, or what an adapter computed;
                                                     x_A = x A^T, B with the LoRA scaling in it

Memory traffic for M ≪ N, K: the N·K weights at 4.127 bits (double quantization) against 16 in bfloat16: at M = 1 a
bandwidth-bound layer can be at most 3.87 times as fast. By arithmetic it stays bandwidth-bound up to M ≈ 76 on an H100.

A byte holds the weights of two neighbouring k. Instead of interleaving them again, which costs more than the product, x
is split the same way:  Σ_k = Σ_{even k} + Σ_{odd k}, two products of half the length. The tile of W is the first
operand of the product, since on Hopper that one may stay in registers.

Few rows leave most of the chip idle, so K is divided among SPLIT programs, each with its own partial sum; adding them
up afterwards is exact enough (float32) and, unlike atomics, always the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.nf4.codec import QuantizedTensor

from .codes import block_absmax, buffers, check_rows, decode, dot_dtype, split_of, tile

BK = 64  # weights of a row at a time: one block, or a part of one
BR = 16  # of a LoRA's rank at a time: any rank takes the same registers and shared memory


@triton.jit(do_not_specialize=["M", "SPLIT"])
def matmul_kernel(
    x_ptr, codes_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, table_ptr, add_ptr, xA_ptr, B_ptr, out_ptr,
    M, N, K, R, add_stride, SPLIT,
    BLOCK_SIZE: tl.constexpr, DOUBLE: tl.constexpr, ADD: tl.constexpr, LORA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: BN outputs of BM rows, over every SPLIT-th block of BK weights; BK divides BLOCK_SIZE divides K."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    half, k = tl.arange(0, BK // 2), tl.arange(0, BK)
    row = n.to(tl.int64) * K  # where row n begins in the flattened weight
    acc = tl.zeros((BN, BM), tl.float32)

    for k0 in range(part * BK, K, SPLIT * BK):
        byte = tl.load(codes_ptr + (row[:, None] + k0) // 2 + half[None, :], mask=n[:, None] < N, other=0)
        absmax = block_absmax(
            (row + k0) // BLOCK_SIZE, n < N, absmax_ptr, nested_ptr, offset_ptr, map_ptr, DOUBLE
        )[:, None]  # fmt: skip
        even, odd = decode(byte, table_ptr)
        x = tl.load(x_ptr + m[:, None].to(tl.int64) * K + k0 + k[None, :], mask=m[:, None] < M, other=0.0)
        x_even, x_odd = tl.split(tl.reshape(x.to(DOT), (BM, BK // 2, 2)))
        w_even = (even * absmax).to(x_ptr.dtype.element_ty).to(DOT)
        w_odd = (odd * absmax).to(x_ptr.dtype.element_ty).to(DOT)
        acc = tl.dot(w_even, tl.trans(x_even), acc, input_precision="ieee")
        acc = tl.dot(w_odd, tl.trans(x_odd), acc, input_precision="ieee")

    if part == 0:  # what is added once, is added to the first part
        if ADD:
            add = add_ptr + m[None, :].to(tl.int64) * add_stride + n[:, None]
            acc += tl.load(add, mask=(m[None, :] < M) & (n[:, None] < N), other=0.0).to(tl.float32)
        if LORA:
            for r0 in range(0, R, BR):
                r = r0 + tl.arange(0, BR)
                B = tl.load(B_ptr + n[:, None] * R + r[None, :], mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)
                xA = tl.load(xA_ptr + m[None, :] * R + r[:, None], mask=(m[None, :] < M) & (r[:, None] < R), other=0.0)
                acc = tl.dot(B.to(DOT), xA.to(DOT), acc, input_precision="ieee")
    out = out_ptr + (part.to(tl.int64) * M + m[:, None]) * N + n[None, :]
    tl.store(out, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def matmul(
    x: Tensor, q: QuantizedTensor, add: Tensor | None = None, xA: Tensor | None = None, B: Tensor | None = None,
    pairs: bool = True,
) -> Tensor:  # fmt: skip
    """x W^T (+ add) (+ xA B^T): x (M, K), q of shape (N, K), xA (M, r), B (N, r) -> (M, N) in x's dtype.

    add is a bias (N,), or (M, N). xA and B, in x's dtype, are a LoRA's x A^T and s·B. Raises InputError where
    block_size does not divide K, or is below 64: blocks that straddle rows have no absmax for each row.
    """
    (M, K), N = x.shape, q.shape[0]
    check_rows(q)
    xA, B = (None if factor is None else factor.contiguous() for factor in (xA, B))
    if add is not None and add.dim() == 1:
        add = add.expand(M, N)
    if add is not None and add.stride(1) != 1:
        add = add.contiguous()
    BM, BN = tile(x.dtype, M)
    split = split_of(triton.cdiv(N, BN) * triton.cdiv(M, BM), K // BK, x.device)
    R = 0 if B is None else B.shape[1]
    out = torch.empty((split, M, N), dtype=torch.float32 if split > 1 else x.dtype, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        matmul_kernel[(triton.cdiv(N, BN), triton.cdiv(M, BM), split)](
            x.contiguous(), *buffers(q, pairs), add, xA, B, out, M, N, K, R, 0 if add is None else add.stride(0), split,
            BLOCK_SIZE=q.block_size, DOUBLE=q.offset is not None, ADD=add is not None, LORA=R > 0,
            BM=BM, BN=BN, BK=BK, BR=BR, DOT=dot_dtype(x.dtype),
            num_warps=4, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    return out.sum(0, dtype=torch.float32).to(x.dtype) if split > 1 else out[0]
