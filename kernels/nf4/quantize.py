"""(b) Dense to NF4: one program reads its blocks once, and writes their codes and absmax.

    c = max |w|        q = #{midpoints of the table below w · (1/c)}        byte = q_even · 16 + q_odd

Memory traffic of n bfloat16 elements: 2n bytes in, n/2 of codes and n/16 of float32 absmax out. The absmax are then
quantized themselves, 1/64 as many, by minilora.nf4 in plain PyTorch: their mean must be known first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.nf4 import TINY, code

BLOCKS = 32  # of 64 in one program


@triton.jit
def count_below(scaled, midpoints_ptr):
    """How many of the 15 midpoints lie below each value: its code; a tie goes to the lower one."""
    q = tl.zeros(scaled.shape, tl.int32)
    for i in tl.static_range(15):
        q += (scaled > tl.load(midpoints_ptr + i)).to(tl.int32)
    return q


@triton.jit
def quantize_kernel(
    w_ptr, codes_ptr, absmax_ptr, midpoints_ptr, n,
    BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCKS whole blocks of the flattened tensor."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    w = tl.load(w_ptr + element, mask=element < n, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(w), axis=1)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK_SIZE < n)
    reciprocal = tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), tl.maximum(absmax, SMALLEST).to(tl.float32))
    scaled = w * reciprocal[:, None]
    even, odd = tl.split(tl.reshape(count_below(scaled, midpoints_ptr), (BLOCKS, BLOCK_SIZE // 2, 2)))
    half = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(codes_ptr + half, (even * 16 + odd).to(tl.uint8), mask=2 * half < n)


def quantize_blocks(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes, uint8, and float32 absmax of the whole blocks of a flat tensor, whose length block_size divides."""
    n = w.numel()
    codes = torch.empty(n // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(n // block_size, dtype=torch.float32, device=w.device)
    table = code(w.device)
    blocks = max(1, BLOCKS * 64 // block_size)
    with torch.cuda.device_of(w):  # Triton launches on the current device
        quantize_kernel[(triton.cdiv(absmax.numel(), blocks),)](
            w.contiguous(), codes, absmax, (table[:-1] + table[1:]) / 2, n,
            BLOCK_SIZE=block_size, BLOCKS=blocks, SMALLEST=TINY, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, absmax
