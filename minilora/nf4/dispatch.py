"""Which operations on a 4-bit weight a Triton kernel does, and which PyTorch.

                  with kernels that have won                   else
    forward       fused kernel, bias and LoRA in it            W dequantized, then cuBLAS
    backward      fused kernel                                 the same, transposed
    dequantize    one pass                                     PyTorch's operations
    quantize      one pass                                     PyTorch's operations

With MINILORA_KERNELS=auto, the default, a kernel is used on a CUDA or ROCm device once its trials there have shown that
it is right and faster (kernel_trials.py). "off" uses none; "on" uses all, untried, on any GPU and on a CPU in Triton's
interpreter. The environment variable is read when a device is first used.
"""

import logging
import os
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from minilora.errors import InputError
from minilora.gradient_checkpointing import inside_checkpoint
from minilora.machine import cache_folder
from minilora.nf4 import codec, scratch
from minilora.nf4.codec import QuantizedTensor, blocks_lie_in_rows
from minilora.nf4.kept_weights import kept_weight
from minilora.nf4.kernel_device import GPU, Kind, Shape
from minilora.nf4.kernel_trials import Trials

MOST_ROWS = 65_535 * 16  # the second axis of a grid, of tiles of 16 rows or more
logger = logging.getLogger("minilora")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what kernels compute with


def has_triton() -> bool:
    """True if Triton 3.6 or newer is installed; torch brings an older one along on some platforms."""
    try:
        major, minor = (int(number) for number in metadata.version("triton").split(".")[:2])
    except metadata.PackageNotFoundError:
        return False
    return (major, minor) >= (3, 6)


def trials_folder() -> Path:
    """Where verdicts are kept. Raises InputError as `cache_folder` does."""
    return cache_folder() / "kernels"


@cache
def trials(device: torch.device) -> Trials | bool:
    """The trials that say which kernels are used on this device; or True: all, or False: none.

    Raises InputError for an unknown value of MINILORA_KERNELS.
    """
    wish = os.environ.get("MINILORA_KERNELS") or "auto"
    if wish not in ("auto", "on", "off"):
        raise InputError(f"MINILORA_KERNELS is {wish!r}: it can be 'auto', 'on' or 'off', or not be set")
    if wish == "off" or (wish == "auto" and device.type != "cuda"):
        return False
    if not has_triton() or find_spec("minilora.kernels") is None:  # run from source, not installed
        return False
    try:
        from minilora.kernels.codes import INTERPRETED
    except Exception as error:
        if wish == "on":
            raise
        logger.warning("PyTorch does the work of the NF4 kernels, since Triton cannot be imported: %s", error)
        return False
    if wish == "on":
        return device.type == "cuda" or INTERPRETED
    if INTERPRETED or not torch.cuda.is_available():  # fake tensors can be on a missing GPU
        return False
    try:
        return Trials(GPU(device), trials_folder())
    except InputError as error:
        logger.warning("PyTorch does the work of the NF4 kernels, whose trials have no place: %s", error)
        return False


def uses_kernel(codes: Tensor, kind: Kind, shape: Shape, M: int = 1) -> bool:
    """Whether this kind of kernel is used for a weight of this shape on the device of codes, and M rows of x."""
    if codec.is_traced(codes):
        return 0 < M <= most_rows(codes.device, *kind, shape)
    known = trials(codes.device)
    return 0 < M <= MOST_ROWS and (known if isinstance(known, bool) else known.wins(kind, shape, M))


@torch.compiler.assume_constant_result
def most_rows(
    device: torch.device, kernel: str, dtype: torch.dtype, block_size: int, double_quant: bool, shape: Shape
) -> int:
    """Up to how many rows the kernel is known to win: a constant in a compiled graph, which serves all M below it."""
    known = trials(device)
    if isinstance(known, bool):
        return MOST_ROWS if known else 0
    return min(MOST_ROWS, known.most_rows(Kind(kernel, dtype, block_size, double_quant), shape))


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
    if rows.dtype not in FLOATS or (transpose and add is not None) or not blocks_lie_in_rows(q):
        return None
    kernel = "backward" if transpose else "gemv" if len(rows) == 1 else "matmul"
    if not uses_kernel(q.codes, kind_of(kernel, q, rows.dtype), q.shape, len(rows)):
        return None
    from minilora.kernels import ops

    if transpose:
        return ops.nf4_backward(rows, *ops.packed(q))
    return ops.nf4_matmul(rows, *ops.packed(q), add, xA, B)


def kind_of(kernel: str, q: QuantizedTensor, dtype: torch.dtype) -> Kind:
    return Kind(kernel, dtype, q.block_size, q.offset is not None)


def quantize_weight(
    w: Tensor, block_size: int = 64, double_quant: bool = True, *, name: str | None = None
) -> QuantizedTensor:
    """nf4.quantize, the blocks by a kernel or by PyTorch: the same bytes."""
    is_for_kernel = w.dtype in FLOATS and block_size in codec.BLOCK_SIZES and w.numel() >= block_size
    if is_for_kernel and uses_kernel(w, Kind("quantize", w.dtype, block_size, False), tuple(w.shape)):
        from minilora.kernels import ops

        return codec.quantize(w, block_size, double_quant, name=name, whole_blocks=ops.nf4_quantize)
    return codec.quantize(w, block_size, double_quant, name=name)


def temporary_weight(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """W, kept or dequantized by a kernel or by PyTorch: the same bytes. The next call here may overwrite it."""
    if (kept := kept_weight(q, dtype)) is not None:
        return kept
    if dtype in FLOATS and uses_kernel(q.codes, kind_of("dequantize", q, dtype), q.shape):
        from minilora.kernels import ops

        return ops.nf4_dequantize(*ops.packed(q), dtype)
    if codec.is_traced(q.codes):
        return codec.dequantize(q, dtype)
    return codec.dequantize(q, out=scratch.workspace("weight", prod(q.shape), dtype, q.codes.device).view(q.shape))


def weight_to_save(q: QuantizedTensor, dtype: torch.dtype) -> Tensor | QuantizedTensor:
    """What autograd saves: q; inside a checkpoint W, so that the recomputation's W serves the backward pass too.

    Not on a CPU, where faulting in the pages of a new W takes longer than dequantizing twice in scratch memory
    (4096 x 4096 in bfloat16, one core: 41 ms against 2 x 15).
    """
    return temporary_weight(q, dtype) if inside_checkpoint() and not _in_scratch_memory(q) else q


def _in_scratch_memory(q: QuantizedTensor) -> bool:
    """Whether the next call of temporary_weight overwrites the result of this one."""
    return q.codes.device.type == "cpu"
