"""(e) dL/dx = dL/dy W, the input's gradient of a frozen 4-bit layer; W is dequantized in registers, as in matmul.py.

    g_x[m, k] = Σ_n g_y[m, n] · w[n, k]

Traffic and roofline are those of the forward product. The sum runs over the rows of W, and absmax varies along it (one
for each n), so that it cannot be taken out of the sum. The two weights of a byte are neighbours in a row of W: they are
interleaved again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.nf4.codec import QuantizedTensor

from .codes import block_absmax, buffers, check_rows, decode, dot_dtype, split_of, tile

BK = 64  # columns of W at a time, which lie in one block


@triton.jit(do_not_specialize=["M", "SPLIT"])
def backward_kernel(
    g_ptr, codes_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, table_ptr, out_ptr,
    M, N, K, SPLIT,
    BLOCK_SIZE: tl.constexpr, DOUBLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: BK columns of BM rows of g_x, over every SPLIT-th block of BN rows of W."""
    k0 = tl.program_id(0) * BK
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    half = tl.arange(0, BK // 2)
    acc = tl.zeros((BM, BK), tl.float32)

    for n0 in range(part * BN, N, SPLIT * BN):
        n = n0 + tl.arange(0, BN)
        row = n.to(tl.int64) * K + k0
        byte = tl.load(codes_ptr + row[:, None] // 2 + half[None, :], mask=n[:, None] < N, other=0)
        absmax = block_absmax(
            row // BLOCK_SIZE, n < N, absmax_ptr, nested_ptr, offset_ptr, map_ptr, DOUBLE
        )[:, None]  # fmt: skip
        even, odd = decode(byte, table_ptr)
        w = tl.interleave(even * absmax, odd * absmax).to(g_ptr.dtype.element_ty).to(DOT)
        g = tl.load(
            g_ptr + m[:, None].to(tl.int64) * N + n[None, :], mask=(m[:, None] < M) & (n[None, :] < N), other=0.0
        ).to(DOT)  # fmt: skip
        acc = tl.dot(g, w, acc, input_precision="ieee")

    k = k0 + tl.arange(0, BK)
    out = out_ptr + (part.to(tl.int64) * M + m[:, None]) * K + k[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=m[:, None] < M)


def backward(g: Tensor, q: QuantizedTensor, pairs: bool = True) -> Tensor:
    """g W: g (M, N), q of shape (N, K) -> (M, K) in g's dtype. Raises InputError as `matmul` does."""
    (M, N), K = g.shape, q.shape[1]
    check_rows(q)
    BM, BN = tile(g.dtype, M)
    split = split_of(K // BK * triton.cdiv(M, BM), triton.cdiv(N, BN), g.device)
    out = torch.empty((split, M, K), dtype=torch.float32 if split > 1 else g.dtype, device=g.device)
    with torch.cuda.device_of(g):  # Triton launches on the current device
        backward_kernel[(K // BK, triton.cdiv(M, BM), split)](
            g.contiguous(), *buffers(q, pairs), out, M, N, K, split,
            BLOCK_SIZE=q.block_size, DOUBLE=q.offset is not None, BM=BM, BN=BN, BK=BK, DOT=dot_dtype(g.dtype),
            num_warps=4, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    return out.sum(0, dtype=torch.float32).to(g.dtype) if split > 1 else out[0]
