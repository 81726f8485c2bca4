"""What all kernels share: a packed byte to its two values, and the absmax of a block (arXiv 2305.14314, section 3).

    byte b  ->  code[b >> 4], code[b & 15]
    block i ->  absmax[i]                         float32, or with double quantization
                map[absmax[i]] · nested_absmax[i // 256] + offset

A byte is looked up once in a table of 256 pairs, or twice in the 16 values. Once takes fewer instructions; but 32
threads that read 8 bytes each from anywhere in 2 KiB wait for each other, while the 16 values are one cache line. By
arithmetic, which no GPU has confirmed, pairs are better where bandwidth leaves time (dequantize) and beside a tensor
core's product, single values in gemv. Each kernel takes either.

A mask, an absmax or an address that is the same for a whole block is computed once for it: tiles have an axis of
blocks. What depends on the single byte keeps the compiler from loading 16 of them at a time.

The product and the sum round twice, as bitsandbytes does it: every kernel is compiled with enable_fp_fusion=False, so
that they do not become one fused multiply-add, and where a fused one is wanted, tl.fma says so.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.errors import InputError
from minilora.nf4.codec import QuantizedTensor, blocks_lie_in_rows, byte_pairs, code, dynamic_map

NESTED = tl.constexpr(256)  # absmax values in a block of their own, minilora.nf4.codec.NESTED_BLOCK_SIZE


def buffers(q: QuantizedTensor, pairs: bool) -> tuple[Tensor, ...]:
    """What every kernel takes of q: codes, absmax, nested_absmax, offset, dynamic map, table of pairs or of values.

    Without double quantization the two in the middle are never read.
    """
    nested = q.absmax if q.nested_absmax is None else q.nested_absmax
    offset = q.absmax if q.offset is None else q.offset
    device = q.codes.device
    table = byte_pairs(device).view(torch.int64) if pairs else code(device)
    return q.codes, q.absmax, nested, offset, dynamic_map(device), table


@triton.jit
def decode(byte, table_ptr):
    """uint8 packed codes -> float32 values of the even and of the odd elements; the table: 256 int64 or 16 float32."""
    index = byte.to(tl.int32)
    if table_ptr.dtype.element_ty == tl.int64:
        pair = tl.load(table_ptr + index)
        even = (pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        odd = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        even = tl.load(table_ptr + (index >> 4))
        odd = tl.load(table_ptr + (index & 15))
    return even, odd


@triton.jit
def block_absmax(block, mask, absmax_ptr, nested_ptr, offset_ptr, map_ptr, DOUBLE: tl.constexpr):
    """float32 absmax of the blocks with these numbers; where masked, any finite value: a 0 of x or no store follows."""
    if DOUBLE:
        quantized = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        nested = tl.load(nested_ptr + block // NESTED, mask=mask, other=0.0)
        absmax = tl.load(map_ptr + quantized) * nested + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    return absmax


# --- launching -------------------------------------------------------------------------------------------------------

INTERPRETED = triton.knobs.runtime.interpret  # kernels run as Python, on a CPU


def check_rows(q: QuantizedTensor) -> None:
    """Raise InputError where the blocks of a matrix do not lie within its rows, 64 or more weights each."""
    if not blocks_lie_in_rows(q):
        raise InputError(
            f"blocks of {q.block_size} in rows of {q.shape[1]}: the fused kernels need block_size >= 64, and rows that"
            " it divides; dequantize and multiply instead"
        )


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The type in which a product takes its operands: x's own; the interpreter gets bfloat16 products wrong."""
    if INTERPRETED:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def tile(dtype: torch.dtype, M: int) -> tuple[int, int]:
    """Rows of x and rows of W in one program: as many as leave registers free, on sm_80 with everything added too.

    float32 has no tensor cores: its products go through registers.
    """
    if dtype == torch.float32:
        return 16, 32
    BM = max(16, min(64, triton.next_power_of_2(M)))
    return BM, 128 if BM < 64 else 64


def split_of(programs: int, pieces: int, device: torch.device) -> int:
    """Among how many programs to divide a sum of so many pieces, so that there are four for each multiprocessor.

    One reads some 4 KiB ahead; to hide the latency of its memory an H100 needs 15 KiB under way in each (arithmetic).
    """
    multiprocessors = 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(pieces, 4 * multiprocessors // programs))
