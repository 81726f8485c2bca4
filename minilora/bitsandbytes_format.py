"""Weights that bitsandbytes quantized to NF4, as its Linear4bit writes them into a safetensors file.

    <layer>.weight                                  codes, uint8 (ceil(n/2), 1)
    <layer>.weight.absmax                           uint8 with double quantization, else float32
    <layer>.weight.quant_map                        the 16 values of NF4
    <layer>.weight.nested_absmax, .nested_quant_map double quantization's own scale and table
    <layer>.weight.quant_state.bitsandbytes__nf4    JSON bytes: shape, dtype, block sizes, offset

minilora's NF4 is the same numbers, so they are taken as they are. Source: QuantState in bitsandbytes/functional.py.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minilora.errors import InputError
from minilora.nf4 import QuantizedTensor, code, dynamic_map

STATE = ".quant_state.bitsandbytes__nf4"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
NESTED_BLOCK_SIZE = 256


def check_is_nf4(config: dict[str, Any], source: str) -> None:
    """InputError, naming `source`, unless a quantization_config of config.json says NF4 by bitsandbytes."""
    method = config.get("quant_method", "an unknown method")
    if method == "bitsandbytes" and config.get("load_in_4bit"):
        method = f"bitsandbytes' {config.get('bnb_4bit_quant_type', 'fp4')}"
    elif method == "bitsandbytes":
        method = "bitsandbytes in 8 bits"
    if method != "bitsandbytes' nf4":
        raise InputError(
            f"{source}: weights quantized by {method} are not supported; take the original model, "
            "or one in bitsandbytes' nf4"
        )


def read_state(weight: str, read: Callable[[str], Tensor]) -> dict[str, Any]:
    """The JSON beside a quantized weight; InputError, naming the tensor, if it is not what bitsandbytes writes."""
    try:
        state = json.loads(bytes(read(weight + STATE).tolist()))
        shape = state["shape"]
        if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in [*shape, state["blocksize"]]):
            raise ValueError(f"shape {shape}, blocksize {state['blocksize']}")
        if state["quant_type"] != "nf4" or state.get("nested_blocksize", NESTED_BLOCK_SIZE) != NESTED_BLOCK_SIZE:
            raise ValueError(f"quant_type {state['quant_type']}, nested_blocksize {state.get('nested_blocksize')}")
        if not isinstance(getattr(torch, state["dtype"]), torch.dtype):
            raise ValueError(f"dtype {state['dtype']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"tensor {weight + STATE} is not a bitsandbytes quantization state ({error!r})") from error
    return state


def read_nf4(weight: str, read: Callable[[str], Tensor]) -> QuantizedTensor:
    """The quantized weight, every part checked; `read` gives the tensor of a name.

    Raises InputError, naming the tensor, for a part of another size or dtype, another table, NaN or infinity.
    """
    state = read_state(weight, read)
    n = math.prod(state["shape"])
    blocks = math.ceil(n / state["blocksize"])
    nested = "nested_offset" in state

    def part(suffix: str, size: int, dtype: torch.dtype) -> Tensor:
        tensor = read(weight + suffix)
        if tensor.numel() != size or tensor.dtype != dtype:
            raise InputError(f"tensor {weight + suffix} has {tensor.numel()} {tensor.dtype} values, not {size} {dtype}")
        if dtype == torch.float32 and not tensor.isfinite().all():
            raise InputError(f"tensor {weight + suffix} holds NaN or infinity")
        return tensor.reshape(-1).clone()

    if not torch.equal(part(".quant_map", 16, torch.float32), code()):
        raise InputError(f"tensor {weight}.quant_map is not the table of NF4")
    if nested and not torch.equal(part(".nested_quant_map", 256, torch.float32), dynamic_map()):
        raise InputError(f"tensor {weight}.nested_quant_map is not bitsandbytes' dynamic 8-bit table")
    return QuantizedTensor(
        codes=part("", math.ceil(n / 2), torch.uint8),
        absmax=part(".absmax", blocks, torch.uint8 if nested else torch.float32),
        shape=tuple(state["shape"]),
        dtype=getattr(torch, state["dtype"]),
        block_size=state["blocksize"],
        nested_absmax=part(".nested_absmax", math.ceil(blocks / NESTED_BLOCK_SIZE), torch.float32) if nested else None,
        offset=torch.tensor(state["nested_offset"], dtype=torch.float32) if nested else None,
    )
