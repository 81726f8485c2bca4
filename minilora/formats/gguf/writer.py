"""Writing a GGUF file, one tensor in memory at a time; formats/gguf/file.py is the way back."""

import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from minilora.errors import InputError
from minilora.progress import progress_bar

Plan = Mapping[str, tuple[tuple[int, ...], str]]  # a tensor's shape, in PyTorch's order, and its type, such as "Q8_0"
FLOAT16_MAX = 65504.0


def write_gguf(
    file: Path, architecture: str, metadata: Mapping[str, Any], plan: Plan, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write the file in a folder beside its place, then rename it: on failure, whatever was there stays.

    `tensors` gives what the plan announces, in its order, in float32 on the CPU; each is rounded to its type by the
    `gguf` package, which is also who knows the layout. Raises InputError for a row that does not divide into the blocks
    of its type and for a file that cannot be written, and lets through what `tensors` raises.
    """
    import gguf

    writer = gguf.GGUFWriter(None, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    sizes = {}
    for name, (shape, kind) in plan.items():
        sizes[name] = _nbytes(name, shape, kind)
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], raw_dtype=number)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as folder:
            new = Path(folder) / file.name
            writer.write_header_to_file(new)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with progress_bar(f"Writing {file.name}", sum(sizes.values()), "%") as advance:
                for (name, tensor), expected in zip(tensors, plan, strict=True):
                    assert name == expected, f"{name} in the place of {expected}"
                    writer.write_tensor_data(_encoded(name, tensor, plan[name][1]))
                    advance(sizes[name])
            writer.close()
            new.replace(file)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}") from None
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """A key with its value, of the type that llama.cpp reads there: whole numbers are counts and ids."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _nbytes(name: str, shape: tuple[int, ...], kind: str) -> int:
    import gguf

    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if shape[-1] % block:
        raise InputError(
            f"{name} has rows of {shape[-1]} numbers, and {kind} takes them in blocks of {block}:"
            " choose f32, f16 or bf16"
        )
    return math.prod(shape) // block * nbytes


def _encoded(name: str, tensor: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """The bytes of a tensor in a type. Raises InputError for what overflows in it: most have a scale in float16."""
    import gguf

    tensor = tensor.detach()
    if kind not in ("F32", "BF16") and float(tensor.abs().max()) > FLOAT16_MAX:
        raise InputError(f"{name} has numbers beyond {FLOAT16_MAX:g}, which overflow in {kind}: choose f32 or bf16")
    values: np.ndarray[Any, Any] = gguf.quantize(tensor.numpy(), gguf.GGMLQuantizationType[kind])
    return values
