"""The state dict of bitsandbytes' Linear4bit, as it is in a safetensors file: read and written.

    <layer>.weight                                  codes, uint8 (ceil(n/2), 1)
    <layer>.weight.absmax                           uint8 with double quantization, else float32
    <layer>.weight.quant_map                        the 16 values of NF4
    <layer>.weight.nested_absmax, .nested_quant_map double quantization's own scale and table
    <layer>.weight.quant_state.bitsandbytes__nf4    JSON bytes: shape, dtype, block sizes, offset

The numbers are minilora's own, bit for bit. Source: QuantState in bitsandbytes/functional.py.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minilora.errors import InputError
from minilora.nf4.codec import NESTED_BLOCK_SIZE, QuantizedTensor, code, dynamic_map

STATE = ".quant_state.bitsandbytes__nf4"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)


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


def quantization_config(double_quant: bool, compute_dtype: torch.dtype, dense: list[str]) -> dict[str, Any]:
    """What config.json says of a model whose linear layers are in NF4, all but those at the paths `dense`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,  # the name is older than 4 bits, and means both
    }


def packed(name: str, q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a file for the weight of this name; `QuantizedWeight` reads them."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {"": q.codes.view(-1, 1), ".absmax": q.absmax, ".quant_map": code()}
    if q.nested_absmax is not None and q.offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": q.offset.item()}
        tensors |= {".nested_absmax": q.nested_absmax, ".nested_quant_map": dynamic_map()}
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {name + suffix: tensor.to("cpu", copy=True) for suffix, tensor in tensors.items()}


class QuantizedWeight:
    """A weight in NF4 and the tensors beside it, every one checked as it is read.

    `read` gives the tensor of a name; `where` names file and tensor for an error. Raises InputError for one that is
    missing, of another size or dtype, with NaN or infinity, or of another kind of quantization.
    """

    def __init__(self, name: str, read: Callable[[str], Tensor], where: Callable[[str], str]) -> None:
        self.name, self.read, self.where = name, read, where
        content = read(name + STATE)
        try:
            state = json.loads(bytes(content.tolist()))
            self.shape: tuple[int, int] = tuple(state["shape"])
            self.block_size: int = state["blocksize"]
            self.dtype: torch.dtype = getattr(torch, state["dtype"])
            self.offset: float | None = state.get("nested_offset")
            sizes = [*self.shape, self.block_size]
            if len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError(f"shape {state['shape']}, blocksize {state['blocksize']}")
            if state["quant_type"] != "nf4" or state.get("nested_blocksize", NESTED_BLOCK_SIZE) != NESTED_BLOCK_SIZE:
                raise ValueError(f"quant_type {state['quant_type']}, nested_blocksize {state.get('nested_blocksize')}")
            if not math.isfinite(self.offset or 0) or not isinstance(self.dtype, torch.dtype):
                raise ValueError(f"nested_offset {self.offset}, dtype {state['dtype']}")
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{where(name + STATE)} is not a bitsandbytes quantization state: {error!r}") from error
        except ValueError as error:
            raise InputError(f"{where(name + STATE)} is not supported: {error}") from error

    def quantized(self) -> QuantizedTensor:
        """The weight, in memory of its own."""
        n = math.prod(self.shape)
        blocks = math.ceil(n / self.block_size)
        nested = self.offset is not None
        if not torch.equal(self._part(".quant_map", 16, torch.float32), code()):
            raise InputError(f"{self.where(self.name + '.quant_map')} is not the table of NF4")
        if nested and not torch.equal(self._part(".nested_quant_map", 256, torch.float32), dynamic_map()):
            raise InputError(f"{self.where(self.name + '.nested_quant_map')} is not bitsandbytes' dynamic 8-bit table")
        nested_blocks = math.ceil(blocks / NESTED_BLOCK_SIZE)
        return QuantizedTensor(
            codes=self._part("", math.ceil(n / 2), torch.uint8),
            absmax=self._part(".absmax", blocks, torch.uint8 if nested else torch.float32),
            shape=self.shape,
            dtype=self.dtype,
            block_size=self.block_size,
            nested_absmax=self._part(".nested_absmax", nested_blocks, torch.float32) if nested else None,
            offset=torch.tensor(self.offset, dtype=torch.float32) if nested else None,
        )

    def _part(self, suffix: str, size: int, dtype: torch.dtype) -> Tensor:
        tensor, where = self.read(self.name + suffix), self.where(self.name + suffix)
        if tensor.numel() != size or tensor.dtype != dtype:
            raise InputError(f"{where} has {tensor.numel()} {tensor.dtype} values, not {size} {dtype}")
        if dtype == torch.float32 and not tensor.isfinite().all():
            raise InputError(f"{where} holds NaN or infinity")
        return tensor.reshape(-1).clone()
