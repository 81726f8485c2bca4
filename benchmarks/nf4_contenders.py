"""Who takes part in the benchmark `kernels`: minilora's ways to compute a case, and those of its peers.

A contender is `build(case, weights, x) -> call`, where `call(i)` computes the case with the i-th of the weights that
take turns, so that no cache serves them. `weights` holds each form of them once, for all contenders and cases of a
shape.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.nf4_cases import Case, Operation
from minilora import nf4
from minilora.nf4.codec import quantize
from minilora.nf4.dispatch import temporary_weight
from minilora.nf4.linear import NF4Linear

Call = Callable[[int], Tensor]
T = TypeVar("T")

MOST_COPIES = 128  # of one weight: more take too long to make
GROUP = 64  # weights that share a scale, in gemlite as in NF4


class Weights:
    """As many random weights (N, K) of one shape as exceed the L2 cache, in every form, made when first asked for."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.key = (case.N, case.K, case.dtype)
        size = case.N * case.K
        self.copies = 1
        if device.type == "cuda":
            self.copies = in_rotation(size / 2, torch.cuda.get_device_properties(device).L2_cache_size)
        scale = case.K**-0.5
        shape = (case.N, case.K)
        self.dense = [(torch.randn(shape, device=device) * scale).to(case.dtype) for _ in range(self.copies)]

    @cached_property
    def quantized(self) -> list[nf4.QuantizedTensor]:
        return [nf4.quantize(W) for W in self.dense]

    @cached_property
    def layers(self) -> list[NF4Linear]:
        return [NF4Linear.from_quantized(q) for q in self.quantized]

    @cached_property
    def packed(self) -> list[tuple[Any, ...]]:
        from minilora.kernels import ops

        return [ops.packed(q) for q in self.quantized]

    @cached_property
    def linear4bit(self) -> list[nn.Module]:
        return [_linear4bit(W).train() for W in self.dense]

    @cached_property
    def linear4bit_eval(self) -> list[nn.Module]:
        """For inference: on CPUs with AVX512-BF16 such layers repack their weights when first called."""
        return [_linear4bit(W).eval() for W in self.dense]

    @cached_property
    def bitsandbytes(self) -> list[tuple[Tensor, Any]]:
        from bitsandbytes.functional import quantize_4bit

        return [quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type="nf4") for W in self.dense]

    @cached_property
    def gemlite(self) -> list[Any]:
        from gemlite.helper import A16W4_HQQ_INT

        processor = A16W4_HQQ_INT(device=str(self.dense[0].device), dtype=self.dense[0].dtype)
        return [processor.from_weights(*affine_int4(W)) for W in self.dense]


def in_rotation(size: float, cache: int) -> int:
    """How many weights of so many bytes fill the cache twice: when one has its turn again, it is not in there."""
    return max(1, min(MOST_COPIES, math.ceil(2 * cache / size)))


def _linear4bit(W: Tensor) -> nn.Module:
    """As transformers makes it: quantized from W's own dtype, to which the layer dequantizes it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(W.shape[1], W.shape[0], False, W.dtype, True, "nf4", device="meta")
    layer.weight = Params4bit(W, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(W.device)


def affine_int4(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W ≈ (codes − zeros) · scales, with codes 0 … 15 over each group's range: uint8 (N, K), and twice (N, K / 64)."""
    groups = W.float().view(W.shape[0], -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = (high - low).clamp(min=1e-6) / 15
    zeros = -low / scales
    codes = (groups / scales + zeros).round().clamp(0, 15).to(torch.uint8)
    return codes.view(W.shape), scales[..., 0].to(W.dtype), zeros[..., 0].to(W.dtype)


# --- minilora ---------------------------------------------------------------------------------------------------------


def minilora(case: Case, weights: Weights, x: Tensor) -> Call:
    """NF4Linear as it is called in a model."""
    return _layers(weights.layers, case, x)


def fused(case: Case, weights: Weights, x: Tensor) -> Call:
    """The fused kernel, by the operator that NF4Linear calls for few rows."""
    from minilora.kernels import ops

    if case.operation == "backward":
        return _each(weights.packed, lambda packed: ops.nf4_backward(x, *packed))
    return _each(weights.packed, lambda packed: ops.nf4_matmul(x, *packed, None, None, None))


def fused_other_table(case: Case, weights: Weights, x: Tensor) -> Call:
    """The same, with the other of the two tables that kernels/nf4/codes.py speaks of."""
    from minilora.kernels.backward import backward
    from minilora.kernels.gemv import gemv
    from minilora.kernels.matmul import matmul

    if case.operation == "backward":
        return _each(weights.quantized, lambda q: backward(x, q, pairs=False))
    if case.M == 1:
        return _each(weights.quantized, lambda q: gemv(x[0], q, pairs=True)[None])
    return _each(weights.quantized, lambda q: matmul(x, q, pairs=False))


def one_pass(case: Case, weights: Weights, x: Tensor) -> Call:
    """Dequantized by one kernel, then multiplied by cuBLAS: what NF4Linear does with many rows."""
    from minilora.kernels import ops

    return _each(weights.packed, lambda packed: _product(case, x, ops.nf4_dequantize(*packed, case.dtype)))


def one_pass_alone(case: Case, weights: Weights, x: Tensor) -> Call:
    """The dequantization of one_pass."""
    from minilora.kernels import ops

    return _each(weights.packed, lambda packed: ops.nf4_dequantize(*packed, case.dtype))


def plain_alone(case: Case, weights: Weights, x: Tensor) -> Call:
    """Dequantized in plain PyTorch: what NF4Linear does where no kernel is used."""
    return _each(weights.quantized, lambda q: nf4.dequantize(q, case.dtype))


def quantized_by_kernel(case: Case, weights: Weights, x: Tensor) -> Call:
    """W to NF4 with double quantization, its blocks by the kernel."""
    from minilora.kernels import ops

    return _each(weights.dense, lambda W: nf4.quantize(W, whole_blocks=ops.nf4_quantize).codes)


def quantized_plainly(case: Case, weights: Weights, x: Tensor) -> Call:
    """The same in plain PyTorch."""
    return _each(weights.dense, lambda W: nf4.quantize(W).codes)


def minilora_alone(case: Case, weights: Weights, x: Tensor) -> Call:
    """W as NF4Linear makes it for a product."""
    return _each(weights.quantized, lambda q: temporary_weight(q, case.dtype))


def minilora_quantized(case: Case, weights: Weights, x: Tensor) -> Call:
    """W to NF4 as NF4Linear.from_linear does it."""
    return _each(weights.dense, lambda W: quantize(W).codes)


# --- peers ------------------------------------------------------------------------------------------------------------


def dense(case: Case, weights: Weights, x: Tensor) -> Call:
    """The weight unquantized."""
    return _each(weights.dense, lambda W: _product(case, x, W))


def bitsandbytes(case: Case, weights: Weights, x: Tensor) -> Call:
    """Linear4bit with double quantization, which chooses between its fused kernel and dequantize + matmul itself."""
    return _layers(weights.linear4bit if case.operation == "backward" else weights.linear4bit_eval, case, x)


def bitsandbytes_dequantized(case: Case, weights: Weights, x: Tensor) -> Call:
    """dequantize_4bit, then matmul; on a GPU PyTorch gives W the same memory each time.

    That is also Unsloth's method, but for the kernel that dequantizes: it stands in where Unsloth is not installed.
    """
    dequantize = bitsandbytes_alone(case, weights, x)
    return lambda i: _product(case, x, dequantize(i))


def bitsandbytes_alone(case: Case, weights: Weights, x: Tensor) -> Call:
    """dequantize_4bit."""
    from bitsandbytes.functional import dequantize_4bit

    return _each(weights.bitsandbytes, lambda packed: dequantize_4bit(*packed))


def bitsandbytes_quantized(case: Case, weights: Weights, x: Tensor) -> Call:
    """quantize_4bit, its statistics compressed."""
    from bitsandbytes.functional import quantize_4bit

    return _each(weights.dense, lambda W: quantize_4bit(W, compress_statistics=True, quant_type="nf4")[0].view(-1))


def gemlite(case: Case, weights: Weights, x: Tensor) -> Call:
    """A stand-in, since gemlite has no NF4: affine 4-bit, a bfloat16 scale and zero for 64 weights, 4.5 bits each."""
    return _each(weights.gemlite, lambda layer: layer(x))


def unsloth(case: Case, weights: Weights, x: Tensor) -> Call:
    """As its LoRA layers do: a fused kernel for a single row, else dequantized, then matmul."""
    from unsloth.kernels.utils import fast_gemv, matmul_lora

    if case.operation == "backward":
        dequantize = unsloth_alone(case, weights, x)
        return lambda i: _product(case, x, dequantize(i))
    if case.M == 1:
        return _each(weights.bitsandbytes, lambda packed: fast_gemv(x[None], *packed)[0])
    return _each(weights.bitsandbytes, lambda packed: matmul_lora(x, *packed, None, None, None))


def unsloth_alone(case: Case, weights: Weights, x: Tensor) -> Call:
    """Its fast_dequantize."""
    from unsloth.kernels.utils import fast_dequantize

    return _each(weights.bitsandbytes, lambda packed: fast_dequantize(*packed))


# --- calls ------------------------------------------------------------------------------------------------------------


def _each(weights: Sequence[T], compute: Callable[[T], Tensor]) -> Call:
    return lambda i: compute(weights[i % len(weights)])


def _product(case: Case, x: Tensor, W: Tensor) -> Tensor:
    return x @ W if case.operation == "backward" else F.linear(x, W)


def _layers(layers: Sequence[nn.Module], case: Case, x: Tensor) -> Call:
    """The layers' outputs of x; or dL/dx of dL/dy = x, without the forward product: its graphs are made here."""
    if case.operation != "backward":
        return _each(layers, lambda layer: layer(x))
    zeros = torch.zeros(case.M, case.K, dtype=x.dtype, device=x.device, requires_grad=True)
    outputs = [layer(zeros) for layer in layers]
    return _each(outputs, lambda y: torch.autograd.grad(y, zeros, x, retain_graph=True)[0])


# --- who takes part ---------------------------------------------------------------------------------------------------

Build = Callable[[Case, Weights, Tensor], Call]

PEERS: dict[str, Build] = {
    "bitsandbytes": bitsandbytes,
    "bitsandbytes, dequantized": bitsandbytes_dequantized,
    "dense": dense,
}
BACKWARD: dict[str, Build] = {
    "minilora": minilora,
    "fused kernel": fused,
    "fused, other table": fused_other_table,
    "one-pass + cuBLAS": one_pass,
    **PEERS,
    "Unsloth": unsloth,
}
CONTENDERS: dict[str, dict[Operation, dict[str, Build]]] = {
    "cuda": {
        "quantize": {
            "minilora": minilora_quantized,
            "quantize kernel": quantized_by_kernel,
            "plain PyTorch": quantized_plainly,
            "bitsandbytes": bitsandbytes_quantized,
        },
        "dequantize": {
            "minilora": minilora_alone,
            "one-pass kernel": one_pass_alone,
            "plain PyTorch": plain_alone,
            "bitsandbytes": bitsandbytes_alone,
            "Unsloth": unsloth_alone,
        },
        "forward": BACKWARD | {"gemlite, affine int4": gemlite},
        "backward": BACKWARD,
    },
    "cpu": {
        "dequantize": {"minilora": minilora_alone, "bitsandbytes": bitsandbytes_alone},
        "forward": {"minilora": minilora, **PEERS},
        "backward": {"minilora": minilora, **PEERS},
    },
}
# contender -> package that it needs, imported in this order: Unsloth changes transformers, PEFT and torch.compile
OPTIONAL: Mapping[str, str] = {
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes, dequantized": "bitsandbytes",
    "gemlite, affine int4": "gemlite",
    "Unsloth": "unsloth",
}
TUNED = ("gemlite, affine int4", "Unsloth")  # which may take minutes to choose among their variants of a kernel


def is_recorded(name: str, case: Case) -> bool:
    """False of what a CUDA graph would not hold.

    Unsloth and bitsandbytes' quantize_4bit launch on the default stream, whatever stream is being recorded; and
    quantizing waits to see that all is finite.
    """
    return name != "Unsloth" and case.operation != "quantize"


def left_out(kind: str) -> set[str]:
    """The optional contenders whose package cannot be used here, each named in a printed line."""
    missing = set()
    for name, package in OPTIONAL.items():
        if any(name in builds for builds in CONTENDERS[kind].values()):
            try:
                importlib.import_module(package)
            except Exception as error:  # without a GPU it is a NotImplementedError, or another
                print(f"{name} is left out: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
                missing.add(name)
    return missing
