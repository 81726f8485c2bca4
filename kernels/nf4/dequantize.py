"""(a) NF4 to dense, the absmax dequantized in the same pass.

    w[i] = code[nibble i] · absmax[i // block_size]          float32, rounded once to the dtype asked for

Memory traffic of n elements: n/2 bytes of codes and n/64 of absmax in (+ n/4096 nested), 2n bytes of bf16 out: 2.52 n.
Little is computed, so the roofline is bandwidth: by arithmetic 12.6 µs for 4096² at an H100's
3.35 TB/s, in which each of its threads has time for 22 instructions an element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.nf4.codec import QuantizedTensor

from .codes import block_absmax, buffers, decode

BYTES = 2048  # of codes in one program: the largest block is one program


@triton.jit
def dequantize_kernel(
    codes_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, table_ptr, out_ptr, n,
    BLOCK_SIZE: tl.constexpr, DOUBLE: tl.constexpr, BYTES: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """One program: BYTES bytes of codes, whole blocks of them; SHORT if the tensor's last block is not whole."""
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * (BYTES // HALF) + tl.arange(0, BYTES // HALF)[:, None]
    byte = block * HALF + tl.arange(0, HALF)[None, :]
    element = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = block * BLOCK_SIZE < n
    byte_inside, element_inside = inside, inside
    if SHORT:  # a mask for each element costs three times as much as all the rest
        byte_inside, element_inside = 2 * byte < n, element < n
    even, odd = decode(tl.load(codes_ptr + byte, mask=byte_inside, other=0), table_ptr)
    absmax = block_absmax(block, inside, absmax_ptr, nested_ptr, offset_ptr, map_ptr, DOUBLE)
    values = tl.interleave(even * absmax, odd * absmax)
    tl.store(out_ptr + element, values.to(out_ptr.dtype.element_ty), mask=element_inside)


def dequantize(
    q: QuantizedTensor, dtype: torch.dtype | None = None, out: Tensor | None = None, pairs: bool = True
) -> Tensor:
    """The tensor back, (q.shape) in `dtype` (by default q.dtype), or in `out`: the bytes of minilora.nf4.dequantize."""
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.codes.device)
    n = out.numel()
    with torch.cuda.device_of(q.codes):  # Triton launches on the current device
        dequantize_kernel[(triton.cdiv(n, 2 * BYTES),)](
            *buffers(q, pairs), out, n,
            BLOCK_SIZE=q.block_size, DOUBLE=q.offset is not None, BYTES=BYTES, SHORT=n % q.block_size != 0,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
