"""(b) Dense to NF4: one program reads its blocks once, and writes their codes and absmax.

    c = max |w|        q = #{midpoints of the table below w · (1/c)}        byte = q_even · 16 + q_odd

Memory traffic of n bfloat16 elements: 2n bytes in, n/2 of codes and n/16 of float32 absmax out. The absmax are then
quantized themselves, 1/64 as many, by minilora.nf4 in plain PyTorch: their mean must be known first. So is a last block
that is not whole.

At an H100's bandwidth there is time for 22 instructions an element. Comparing each with 15 midpoints takes more than
that by itself, so this kernel is bound by arithmetic; PyTorch's own operations, one for each comparison, move some 300
bytes an element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.nf4.codec import TINY, code, midpoints

BLOCKS = 64  # of 64 in one program


@triton.jit
def count_below(scaled, midpoints_ptr):
    """How many of the 15 midpoints lie below each value: its code. A tie goes to the lower one."""
    q = tl.zeros(scaled.shape, tl.int32)
    for i in tl.static_range(15):
        q = tl.where(scaled > tl.load(midpoints_ptr + i), i + 1, q)  # they rise: the last one below has the count
    return q


@triton.jit
def quantize_kernel(
    w_ptr, codes_ptr, absmax_ptr, midpoints_ptr, n_blocks,
    BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCKS whole blocks of the flattened tensor."""
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < n_blocks
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    w = tl.load(w_ptr + element, mask=inside[:, None], other=0.0).to(tl.float32)
    # As integers, whose order is that of |w|, with infinity and NaN on top: a maximum of floats would pass over a NaN.
    magnitude = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + block, absmax, mask=inside)
    reciprocal = tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), tl.maximum(absmax, SMALLEST).to(tl.float32))
    even, odd = tl.split(tl.reshape(count_below(w * reciprocal[:, None], midpoints_ptr), (BLOCKS, HALF, 2)))
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(codes_ptr + byte, (even * 16 + odd).to(tl.uint8), mask=inside[:, None])


def quantize(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes, uint8, and float32 absmax of the whole blocks of a flat tensor, whose length block_size divides.

    The bytes of minilora.nf4.quantize_whole_blocks.
    """
    n_blocks = w.numel() // block_size
    codes = torch.empty(w.numel() // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(n_blocks, dtype=torch.float32, device=w.device)
    blocks = max(1, BLOCKS * 64 // block_size)
    with torch.cuda.device_of(w):  # Triton launches on the current device
        quantize_kernel[(triton.cdiv(n_blocks, blocks),)](
            w.contiguous(), codes, absmax, midpoints(code(w.device)), n_blocks,
            BLOCK_SIZE=block_size, BLOCKS=blocks, SMALLEST=TINY, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, absmax
