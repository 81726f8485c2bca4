"""NF4 on plain tensors: the table, quantize, dequantize and double quantization (QLoRA, arXiv 2305.14314).

    w  = 64 weights                 a block
    c  = max |w|                    its absmax, float32
    q  = #{midpoints below w / c}   the nearest of 16 codes, 4 bits a weight
    w' = code[q] * c                in float32, then rounded once to the dtype asked for

A float32 absmax for 64 weights costs half a bit a weight. Double quantization stores it in 8 bits instead,
(absmax - offset) in blocks of 256 with a second table of 256 values: 4.5 bits a weight become 4.127.

Codes, statistics and dequantized values are bitsandbytes' own, byte for byte.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from minilora.errors import InputError
from minilora.nf4.scratch import look_up_pairs

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
TINY = 1e-38  # the absmax a block of zeros is divided by
# Elements at a time: on a CPU few enough that the temporaries stay in its cache, elsewhere so many that launches do not
# count (each element takes up to 16 bytes of temporaries).
QUANTIZE_CHUNK, DEQUANTIZE_CHUNK, CHUNK_ELSEWHERE = 1 << 17, 1 << 20, 1 << 24


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor of n elements in NF4, as plain tensors; blocks run over the flattened tensor, across its rows.

    Args:
        codes: uint8 (ceil(n / 2),), two codes a byte, the first in the high nibble.
        absmax: (n_blocks,), float32; with double quantization uint8 codes of the dynamic map.
        shape: of the tensor that was quantized.
        dtype: of the tensor that was quantized.
        block_size: elements that share an absmax.
        nested_absmax: float32 (ceil(n_blocks / nested_block_size),); None without double quantization.
        offset: float32 (), the mean of the absmax; None without double quantization.
        nested_block_size: absmax values that share a nested absmax.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = 64
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None
    nested_block_size: int = NESTED_BLOCK_SIZE


def blocks_lie_in_rows(q: QuantizedTensor) -> bool:
    """The fused kernels multiply each row's blocks by their absmax; where blocks straddle rows they cannot."""
    return q.block_size >= 64 and q.shape[1] % q.block_size == 0


# ---------------------------------------------------------------------------------------------------- the tables


@cache
def code(device: torch.device | str = "cpu") -> Tensor:
    """The 16 values of NF4: quantiles of N(0, 1), scaled to [-1, 1], with an exact zero.

    Eight values lie above zero and seven below. The outermost probability is the reference implementation's
    0.9677083, which is 1 - (1/30 + 1/32) / 2 cut to seven digits.

    Args:
        device: where the table is to be.

    Returns:
        float32 (16,), rising; the same tensor at every call.

    Source: QLoRA, arXiv 2305.14314, section 3 and appendix E.
    """
    above = _normal_quantiles(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float32, device="cpu")[:-1])
    below = -_normal_quantiles(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float32, device="cpu")[:-1])
    values = torch.cat([below, torch.zeros_like(above[:1]), above]).sort().values
    return (values / values.max()).to(device)


def _normal_quantiles(p: Tensor) -> Tensor:
    return torch.tensor([NormalDist().inv_cdf(x) for x in p.tolist()], dtype=torch.float32, device="cpu")


@cache
def byte_pairs(device: torch.device) -> Tensor:
    """The two values of each byte of packed codes, float32 (256, 2)."""
    byte = torch.arange(256, device="cpu")
    return torch.stack((code()[byte >> 4], code()[byte & 15]), dim=1).to(device)


@cache
def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, float32 (256,), rising from -0.993 to 1.

    Each decade down to 1e-6 has half as many values as the one above it, on both sides of one zero
    (Dettmers, arXiv 1511.04561, section 2; 1 is added by hand, so the map is not symmetric).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        centres = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += centres.tolist() + (-centres).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


# ------------------------------------------------------------------------------------------------------ quantize


def quantize(
    w: Tensor,
    block_size: int = 64,
    double_quant: bool = True,
    *,
    name: str | None = None,
    absmax_rule: Literal["table", "nearest"] | None = None,
    whole_blocks: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None,
) -> QuantizedTensor:
    """Quantize a floating-point tensor of any shape to NF4.

    Args:
        w: the tensor, (...), of any floating-point dtype.
        block_size: elements that share an absmax, a power of two from 32 to 4096.
        double_quant: quantize the absmax to 8 bits as well.
        name: what errors call the tensor; by default its shape.
        absmax_rule: how double quantization rounds to its 8-bit codes: to the "nearest", or by a "table", which first
            rounds to a grid of 65,536 points and so picks another code in about 0.2% of the blocks. None takes what
            bitsandbytes uses on w's device: "table" on a CPU, else "nearest".
        whole_blocks: what to call in the place of `quantize_whole_blocks`, with the same result, such as a kernel.

    Returns:
        The packed codes and their statistics, on w's device.

    Raises:
        InputError: if w is not floating point, is empty, or has a NaN or an infinity, or for another block_size.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """
    name = name or f"a tensor of shape {tuple(w.shape)}"
    if block_size not in BLOCK_SIZES:
        raise InputError(f"block_size {block_size} is not one of {BLOCK_SIZES}")
    if not w.is_floating_point() or w.numel() == 0:
        raise InputError(f"{name} cannot be quantized to NF4: it has {w.numel()} elements of {w.dtype}")
    if w.is_meta:
        raise InputError(f"{name} cannot be quantized to NF4: it is on the meta device, which holds no numbers")
    x = w.detach().reshape(-1)
    full = x.numel() - x.numel() % block_size
    codes, absmax = (whole_blocks or quantize_whole_blocks)(x[:full], block_size)
    if full < x.numel():
        last = _quantize_short_block(x[full:])
        codes, absmax = (torch.cat(parts) for parts in zip((codes, absmax), last, strict=True))
    offset = absmax.mean()
    if not offset.isfinite():
        raise InputError(f"{name} cannot be quantized to NF4: {_first_not_finite(x)}")
    if not double_quant:
        return QuantizedTensor(codes, absmax, tuple(w.shape), w.dtype, block_size)
    rule = absmax_rule or ("table" if w.device.type == "cpu" else "nearest")
    absmax, nested_absmax = _quantize_absmax(absmax.sub_(offset), rule)
    return QuantizedTensor(codes, absmax, tuple(w.shape), w.dtype, block_size, nested_absmax, offset)


def quantize_whole_blocks(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes and float32 absmax of a flat tensor, whose length block_size divides, chunk by chunk."""
    n = x.numel()
    codes = torch.empty(n // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(n // block_size, dtype=torch.float32, device=x.device)
    chunk = QUANTIZE_CHUNK if x.device.type == "cpu" else CHUNK_ELSEWHERE
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        blocks = x[start:stop].float().view(-1, block_size)
        c = torch.amax(blocks.abs(), dim=-1, out=absmax[start // block_size : stop // block_size])
        codes[start // 2 : stop // 2] = encode((blocks * (1 / c.clamp(min=TINY)).unsqueeze(-1)).view(-1))
    return codes, absmax


def _quantize_short_block(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a short last block: divided, not multiplied by a reciprocal, as bitsandbytes does on a CPU."""
    tail = x.float()
    c = tail.abs().max().clamp(min=TINY)
    return encode(F.pad(tail / c, (0, len(tail) % 2))), c.view(1)


def encode(scaled: Tensor) -> Tensor:
    """The codes of an even number of float32 values in [-1, 1], two a byte.

    A code is the number of midpoints that lie below the value, so a tie goes to the lower code. On a CPU 15
    vectorized comparisons are many times faster than bucketize.
    """
    q, below = torch.zeros_like(scaled), torch.empty_like(scaled)
    for midpoint in midpoints(code()).tolist():
        q += torch.gt(scaled, midpoint, out=below)
    return torch.add(q[1::2], q[::2], alpha=16).int().byte()


def _quantize_absmax(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """uint8 codes of the dynamic map, and the float32 absmax of each 256 of them; x (n_blocks,) is overwritten."""
    n = x.numel()
    blocks = F.pad(x, (0, -n % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = blocks.abs().amax(dim=-1)
    if rule == "nearest":
        codes = _nearest_in_map(blocks.mul_((1 / nested_absmax.clamp(min=TINY)).unsqueeze(-1)))
    else:
        blocks.mul_((1 / nested_absmax).unsqueeze(-1)).clamp_(-1, 1).nan_to_num_(-1)  # 0 * inf: a block of zeros
        cell = blocks.view(-1).add_(1).mul_(0.5).mul_(65535).add_(0.5).int()  # of a uniform grid on [-1, 1]
        codes = torch.index_select(_rounding_table(x.device), 0, cell)
    return codes.view(-1)[:n], nested_absmax


def _nearest_in_map(x: Tensor) -> Tensor:
    return torch.bucketize(x, midpoints(dynamic_map(x.device)), out_int32=True).byte()


@cache
def _rounding_table(device: torch.device) -> Tensor:
    """The code nearest to each point of the uniform grid, uint8 (65536,)."""
    return _nearest_in_map(2 * torch.arange(65536, dtype=torch.float32, device=device) / 65535 - 1)


def _first_not_finite(x: Tensor) -> str:
    bad = (~x.isfinite()).nonzero()
    if len(bad) == 0:
        return "its values are so large that the mean of their absmax overflows float32"
    return f"element {bad[0].item()} of the flattened tensor is {x[bad[0]].item()} ({len(bad)} are not finite)"


# ---------------------------------------------------------------------------------------------------- dequantize


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The tensor back: code * absmax in float32, rounded once.

    Args:
        q: the quantized tensor.
        dtype: of the result; by default that of the tensor that was quantized.
        out: a contiguous tensor of q's shape to fill, whose dtype is then the result's.

    Returns:
        The tensor, of q's shape; `out` where it is given.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.codes.device)
    if is_traced(q.codes):
        packed = q.codes, q.absmax, q.nested_absmax, q.offset, out.numel(), q.block_size, q.nested_block_size
        return out.copy_(_dequantize_in_a_graph(*packed, out.dtype).view(q.shape))
    flat, absmax, size = out.view(-1), dequantize_absmax(q), q.block_size
    chunk = DEQUANTIZE_CHUNK if out.device.type == "cpu" else CHUNK_ELSEWHERE
    for start in range(0, flat.numel(), chunk):
        stop = min(start + chunk, flat.numel())
        codes = q.codes[start // 2 : -(-stop // 2)]
        values = look_up_pairs(byte_pairs(codes.device), codes)[: stop - start]
        flat[start:stop] = _scale_blocks_(values, absmax[start // size : -(-stop // size)], size)
    return out


def dequantize_absmax(q: QuantizedTensor) -> Tensor:
    """The float32 absmax of every block, (n_blocks,): map[code] * nested_absmax + offset, or as it was stored."""
    if q.nested_absmax is None or q.offset is None:
        return q.absmax
    values = torch.index_select(dynamic_map(q.absmax.device), 0, q.absmax.int())
    return _scale_blocks_(values, q.nested_absmax, q.nested_block_size).add_(q.offset)


def _scale_blocks_(values: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """values[i] *= absmax[i // block_size], in place; the last block may be short."""
    whole = values.numel() // block_size
    values[: whole * block_size].view(whole, block_size).mul_(absmax[:whole].unsqueeze(-1))
    if whole < absmax.numel():
        values[whole * block_size :].mul_(absmax[whole])
    return values


# ------------------------------------------------------------------------------------------- torch.compile, capture


def is_traced(codes: Tensor) -> bool:
    """True while torch.compile traces, and for fake tensors: a table or buffer made now would be a fake, for good."""
    return torch.compiler.is_compiling() or isinstance(codes, FakeTensor)


@torch.library.custom_op("minilora::dequantize", mutates_args=())
def _dequantize_in_a_graph(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    n: int, block_size: int, nested_block_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The n elements as one operator, so that no table or buffer is part of the graph."""
    return dequantize(QuantizedTensor(codes, absmax, (n,), dtype, block_size, nested_absmax, offset, nested_block_size))


@_dequantize_in_a_graph.register_fake
def _(codes: Tensor, *others: Any) -> Tensor:
    *_, n, _, _, dtype = others
    return codes.new_empty(n, dtype=dtype)


def make_tables(codes: Tensor) -> None:
    """Make dequantization's tables where codes are: in a CUDA graph's capture nothing could be copied to the GPU."""
    if not codes.is_meta and not is_traced(codes):
        dynamic_map(codes.device)
        byte_pairs(codes.device)
