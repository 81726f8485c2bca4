"""What a file of tensors was written with, kept beside it: a damaged file is told before anything of it is used.

"optimizer.exp_avg.layers.0.lora_A": ["float32", [16, 576], 2212294583]      dtype, shape, CRC-32 of the bytes
"""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minilora.errors import InputError

__all__ = ["check_tensors", "checksums"]


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Dtype, shape and checksum of each, as JSON."""
    return {name: [*_kind(tensor), _crc(tensor)] for name, tensor in tensors.items()}


def check_tensors(tensors: Mapping[str, Tensor], saved: Mapping[str, list[Any]], file: str) -> None:
    """Raise InputError naming the first tensor that is not what was saved: missing, one too many, of another kind."""
    for name in sorted(tensors.keys() | saved.keys()):
        if name not in tensors:
            problem = "is missing"
        elif name not in saved:
            problem = "was not saved there"
        elif _kind(tensors[name]) != saved[name][:2]:
            (dtype, shape), (saved_dtype, saved_shape) = _kind(tensors[name]), saved[name][:2]
            problem = f"is {dtype} {shape}, and was saved as {saved_dtype} {saved_shape}"
        elif _crc(tensors[name]) != saved[name][2]:
            problem = "does not have the values that were saved"
        else:
            continue
        raise InputError(f"{file} is damaged: {name} {problem}")


def _kind(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
