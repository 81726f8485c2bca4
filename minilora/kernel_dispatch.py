"""What a Triton kernel does with a 4-bit weight, and what PyTorch's own operations: measured on each GPU, not guessed.

    M, rows of x   1 … M*                        above M*
    forward        fused kernel                  one-pass dequantization, then cuBLAS
    backward       fused kernel                  the same, transposed
    quantize       a kernel where it is the faster one, whatever the shape

M* is where the fused kernel stops being the faster one. `python -m benchmarks gpu` measures it, and writes it for the
GPU at hand into kernels/nf4/crossovers.json. On a GPU that is not in there no kernel is used, nor on a CPU, nor without
Triton. The environment variable MINILORA_KERNELS says otherwise: "off" uses none, "on" all wherever they can run: on
any GPU, and on a CPU in Triton's interpreter. It is read when a device is first used.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from minilora import nf4
from minilora.errors import InputError
from minilora.kept_weights import kept_weight
from minilora.nf4 import QuantizedTensor


@dataclass(frozen=True)
class Crossovers:
    """Up to how many rows of x the fused kernels are used; 0: never. dequantize, quantize: by a kernel or by PyTorch.

    The limits are measured in bfloat16. float32, which has no tensor cores, would have lower ones: it takes no fused
    kernel but where `float32` says so.
    """

    forward: int = 0
    backward: int = 0
    dequantize: bool = False
    quantize: bool = False
    float32: bool = False


MOST_ROWS = 65_535 * 16  # the second axis of a grid, of tiles of 16 rows or more
MEASURED = ("forward", "backward", "dequantize", "quantize")  # the fields that crossovers.json has for a GPU
NEVER = Crossovers()
ALWAYS = Crossovers(forward=MOST_ROWS, backward=MOST_ROWS, dequantize=True, quantize=True, float32=True)


def measured_file() -> Path:
    """crossovers.json, beside the kernels: {name of the GPU: {forward, …, date, versions}}."""
    spec = find_spec("minilora.kernels")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).with_name("crossovers.json")


def has_triton() -> bool:
    """True if Triton 3.6 or newer is installed; torch brings an older one along on some platforms."""
    try:
        major, minor = (int(number) for number in metadata.version("triton").split(".")[:2])
    except metadata.PackageNotFoundError:
        return False
    return (major, minor) >= (3, 6)


@torch.compiler.assume_constant_result
def crossovers(device: torch.device) -> Crossovers:
    """What is used on this device; a constant in a compiled graph."""
    return read_crossovers(device)


@cache
def read_crossovers(device: torch.device) -> Crossovers:
    """What is used on this device: looked up once. Raises InputError for a MINILORA_KERNELS that is no choice."""
    wish = os.environ.get("MINILORA_KERNELS", "")
    if wish not in ("", "on", "off"):
        raise InputError(f"MINILORA_KERNELS is {wish!r}: it can be 'on' or 'off', or not be set")
    if wish == "off" or not has_triton() or find_spec("minilora.kernels") is None:  # run from source, not installed
        return NEVER
    if wish == "on":
        from minilora.kernels.codes import INTERPRETED

        return ALWAYS if device.type == "cuda" or INTERPRETED else NEVER
    if device.type != "cuda":
        return NEVER
    measured = json.loads(measured_file().read_text(encoding="utf-8")).get(torch.cuda.get_device_name(device), {})
    return Crossovers(**{key: measured[key] for key in MEASURED if key in measured})


def fused_product(
    rows: Tensor,
    q: QuantizedTensor,
    transpose: bool,
    add: Tensor | None,
    xA: Tensor | None = None,
    B: Tensor | None = None,
) -> Tensor | None:
    """rows W^T (+ add) (+ xA B^T), or with `transpose` rows W, by a fused kernel; None where another way is faster.

    rows (M, K), add (N,) or (M, N), xA (M, r), B (N, r), all in float32, bfloat16 or float16; with `transpose` rows
    (M, N) and nothing added.
    """
    limit = crossovers(rows.device)
    if not 0 < len(rows) <= (limit.backward if transpose else limit.forward) or not blocks_lie_in_rows(q):
        return None
    if rows.dtype == torch.float64 or (transpose and add is not None):
        return None
    if rows.dtype == torch.float32 and not limit.float32:
        return None
    from minilora.kernels import ops

    if transpose:
        return ops.nf4_backward(rows, *ops.packed(q))
    return ops.nf4_matmul(rows, *ops.packed(q), add, xA, B)


def blocks_lie_in_rows(q: QuantizedTensor) -> bool:
    """The fused kernels multiply each row's blocks by their absmax; where blocks straddle rows they cannot."""
    return q.block_size >= 64 and q.shape[1] % q.block_size == 0


def quantize(w: Tensor, block_size: int = 64, double_quant: bool = True, *, name: str | None = None) -> QuantizedTensor:
    """nf4.quantize, the blocks by a kernel or by PyTorch: the same bytes."""
    if crossovers(w.device).quantize and w.dtype in (torch.float32, torch.bfloat16, torch.float16):
        from minilora.kernels import ops

        return nf4.quantize(w, block_size, double_quant, name=name, whole_blocks=ops.nf4_quantize)
    return nf4.quantize(w, block_size, double_quant, name=name)


def temporary_weight(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """W, kept or made by a kernel or by PyTorch: the same bytes. To read once: the next call here may overwrite it."""
    if (kept := kept_weight(q, dtype)) is not None:
        return kept
    if crossovers(q.codes.device).dequantize and dtype != torch.float64:
        from minilora.kernels import ops

        return ops.nf4_dequantize(*ops.packed(q), dtype)
    if nf4.is_traced(q.codes):
        return nf4.dequantize(q, dtype)
    return nf4.dequantize(q, out=nf4.workspace("weight", prod(q.shape), dtype, q.codes.device).view(q.shape))
