"""Writing a GGUF file with the `gguf` package, one tensor in memory at a time; formats/gguf/file.py reads it."""

import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType
from torch import Tensor

from minilora.errors import InputError
from minilora.formats.atomic import atomic_files
from minilora.progress import progress_bar

Plan = Mapping[str, tuple[tuple[int, ...], str]]  # a tensor's shape, in PyTorch's order, and its type, such as "Q8_0"
FLOAT16_MAX = 65504.0
# What llama.cpp reads at the keys written here: whole numbers are counts and ids
VALUE_TYPES = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
    list: GGUFValueType.ARRAY,
}


def write_gguf(
    file: Path, architecture: str, metadata: Mapping[str, Any], plan: Plan, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write the file whole or not at all.

    `tensors` gives what the plan announces, in its order, in float32 on the CPU. Raises InputError for a name that
    other tools, and `load`, would not take for GGUF, for a row that does not divide into the blocks of its type and for
    a file that cannot be written; what `tensors` raises passes through.
    """
    if file.suffix != ".gguf":
        raise InputError(f"{file}: the name of a GGUF file ends in .gguf")
    if file.is_dir():
        raise InputError(f"{file} is a folder; name a file")
    writer = gguf.GGUFWriter(None, architecture)
    general = gguf.Keys.General
    metadata = {general.NAME: file.stem, general.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION, **metadata}
    for key, value in metadata.items():
        if value not in ("", []):
            writer.add_key_value(key, value, VALUE_TYPES[type(value)])
    sizes = {}
    for name, (shape, kind) in plan.items():
        number = gguf.GGMLQuantizationType[kind]
        block, nbytes = gguf.GGML_QUANT_SIZES[number]
        if shape[-1] % block:
            raise InputError(
                f"{name} has rows of {shape[-1]} numbers, and {kind} takes them in blocks of {block}:"
                " choose f32, f16 or bf16"
            )
        sizes[name] = math.prod(shape) // block * nbytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], raw_dtype=number)
    try:
        with atomic_files(file.parent) as folder, closing(writer):
            writer.write_header_to_file(folder / file.name)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with progress_bar(f"Writing {file.name}", sum(sizes.values()), "%") as advance:
                for (name, tensor), expected in zip(tensors, plan, strict=True):
                    assert name == expected, f"{name} in the place of {expected}"
                    writer.write_tensor_data(_encoded(name, tensor, plan[name][1]))
                    advance(sizes[name])
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}") from None


def _encoded(name: str, tensor: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """The bytes of a tensor in a type. Raises InputError for what overflows in it: most have a scale in float16."""
    tensor = tensor.detach()
    if kind not in ("F32", "BF16") and float(tensor.abs().max()) > FLOAT16_MAX:
        raise InputError(f"{name} has numbers beyond {FLOAT16_MAX:g}, which overflow in {kind}: choose f32 or bf16")
    values: np.ndarray[Any, Any] = gguf.quantize(tensor.numpy(), gguf.GGMLQuantizationType[kind])
    return values
