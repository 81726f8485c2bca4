"""NF4 on plain tensors: the table, quantize, dequantize, double quantization (QLoRA, arXiv 2305.14314, sections 2-3).

    w  = 64 weights            a block
    c  = max |w|               absmax, one float32 a block
    q  = #{midpoints < w / c}  the nearest of 16 codes, 4 bits a weight
    w' = code[q] * c           one rounding, from float32 to the dtype asked for

Double quantization stores absmax itself in 8 bits: (absmax - mean) in blocks of 256 with a second, 256-entry map.
"""

from dataclasses import dataclass
from functools import cache
from math import prod
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from minilora.errors import InputError

AbsmaxRule = Literal["table", "nearest"]


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in NF4, as plain tensors."""

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = 64
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None
    nested_block_size: int = 256


@cache
def code(device: torch.device | str = "cpu") -> Tensor:
    """The 16 values of NF4, float32 (16,), rising from -1 to 1 with one exact zero (QLoRA, section 3 and appendix E)."""
    edge = 0.9677083
    positive = _normal_quantiles(torch.linspace(edge, 0.5, 9)[:-1])
    negative = -_normal_quantiles(torch.linspace(edge, 0.5, 8)[:-1])
    values = torch.cat([negative, torch.zeros(1), positive]).sort().values
    return (values / values.max()).to(device)


def _normal_quantiles(p: Tensor) -> Tensor:
    return torch.tensor([NormalDist().inv_cdf(x) for x in p.tolist()])


@cache
def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, float32 (256,) (Dettmers, arXiv 1511.04561)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values)).to(device)


def quantize(
    w: Tensor,
    block_size: int = 64,
    double_quant: bool = True,
    *,
    name: str | None = None,
    absmax_rule: AbsmaxRule | None = None,
) -> QuantizedTensor:
    """Quantize a floating-point tensor of any shape to NF4."""
    n = w.numel()
    x = w.detach().reshape(-1).float()
    full = n - n % block_size
    blocks = x[:full].view(-1, block_size)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38)).unsqueeze(-1)).clamp(-1, 1).view(-1)
    if full < n:
        tail = x[full:].abs().max().clamp(min=1e-38)
        absmax = torch.cat([absmax, tail.view(1)])
        scaled = torch.cat([scaled, (x[full:] / tail).clamp(-1, 1)])
    if not absmax.isfinite().all():
        raise InputError(
            f"{name or 'the tensor to quantize'} has NaN or infinite values: NF4 cannot hold them"
        )
    if n % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    q = torch.bucketize(scaled, _midpoints(code(w.device)), out_int32=True).to(torch.uint8)
    codes = (q[::2] << 4) | q[1::2]
    shape = tuple(w.shape)
    if not double_quant:
        return QuantizedTensor(codes, absmax, shape, w.dtype, block_size)
    offset = absmax.mean()
    rule = absmax_rule or ("table" if w.device.type == "cpu" else "nearest")
    absmax, nested = _quantize_absmax(absmax - offset, 256, rule)
    return QuantizedTensor(codes, absmax, shape, w.dtype, block_size, nested, offset)


def _quantize_absmax(x: Tensor, block_size: int, rule: AbsmaxRule) -> tuple[Tensor, Tensor]:
    n = x.numel()
    blocks = torch.nn.functional.pad(x, (0, -n % block_size)).view(-1, block_size)
    nested = blocks.abs().amax(-1)
    midpoints = _midpoints(dynamic_map(x.device))
    if rule == "table":
        scaled = (blocks * (1 / nested).unsqueeze(-1)).clamp(-1, 1).nan_to_num(-1)
        scaled = 2 * ((scaled + 1) * 0.5 * 65535 + 0.5).int() / 65535 - 1
    else:
        scaled = (blocks * (1 / nested.clamp(min=1e-38)).unsqueeze(-1)).clamp(-1, 1)
    return torch.bucketize(scaled.view(-1)[:n], midpoints).to(torch.uint8), nested


def _midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


def dequantize_absmax(q: QuantizedTensor) -> Tensor:
    """The float32 absmax of every block, (n_blocks,)."""
    if q.nested_absmax is None or q.offset is None:
        return q.absmax
    values = dynamic_map(q.absmax.device)[q.absmax.int()]
    per_block = q.nested_absmax.repeat_interleave(q.nested_block_size)[: values.numel()]
    return values.mul_(per_block).add_(q.offset)


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The tensor back: float32 code * absmax, rounded once to ``dtype``."""
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.codes.device)
    n = prod(q.shape)
    pairs = torch.nn.functional.embedding(q.codes.int(), _byte_pairs(q.codes.device)).view(-1)[:n]
    absmax = dequantize_absmax(q).repeat_interleave(q.block_size)[:n]
    out.view(-1).copy_(pairs.mul_(absmax))
    return out


@cache
def _byte_pairs(device: torch.device) -> Tensor:
    byte = torch.arange(256, device=device)
    return torch.stack([code(device)[byte >> 4], code(device)[byte & 15]], dim=1)
