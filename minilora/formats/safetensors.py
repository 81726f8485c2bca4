"""SafetensorsCheckpoint: a Hugging Face folder (config.json and safetensors files), read one tensor at a time."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.errors import InputError
from minilora.models import ModelConfig
from minilora.nf4 import QuantizedTensor, bitsandbytes

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HARMLESS = re.compile(r".*\.rotary_emb\.inv_freq")  # older transformers saved the frequencies; config.json has them


class SafetensorsCheckpoint:
    """The tensors and the configuration of a folder with model.safetensors, or its shards and their index.

    Raises InputError, naming the file and the tensor, for a folder or a file that is not such a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        hf = read_config(folder)
        self.config = ModelConfig.from_hf(hf, source=str(folder / "config.json"))
        if hf.get("quantization_config"):
            bitsandbytes.check_is_nf4(hf["quantization_config"], str(folder / "config.json"))
        self._files = _tensor_files(folder)
        self._quantized = {
            name.removesuffix(bitsandbytes.STATE) for name in self._files if name.endswith(bitsandbytes.STATE)
        }

    @property
    def dtype(self) -> torch.dtype:
        """What the embedding is stored in, which is never quantized; config.json is sometimes wrong about it."""
        return self._read("model.embed_tokens.weight").dtype

    def names(self) -> Iterable[str]:
        """Name of every tensor of the model; the parts of a quantized one do not count."""
        parts = {name + part for name in self._quantized for part in bitsandbytes.PARTS}
        return [name for name in self._files if name not in parts and not HARMLESS.fullmatch(name)]

    def where(self, name: str) -> str:
        """File and tensor as an error message names them."""
        return f"{self._files.get(name, self.folder)}: tensor {name}"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, of a quantized one before it was quantized."""
        if name in self._quantized:
            return bitsandbytes.QuantizedWeight(name, self._read, self.where).shape
        with _open(self._files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """A tensor as the file has it: a view of the mapped file, so copy what is to be kept; or already in NF4."""
        if name in self._quantized:
            return bitsandbytes.QuantizedWeight(name, self._read, self.where).quantized()
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        if name not in self._files:
            raise InputError(f"{self.where(name)} is missing")
        # Opened anew for each tensor: as long as a file is open, every page read from it counts as our memory.
        with _open(self._files[name]) as file:
            return file.get_tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError, naming the file, if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; InputError if it has none."""
    path = folder / "config.json"
    if path.is_file():
        return read_json(path)
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} is an adapter, not a model: load its base model, then load_adapter(model, folder)")
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
    raise InputError(f"{folder} has no config.json, so it is no Hugging Face model; it holds {found}")


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _sharded(folder, index)
    single = folder / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(_keys(single), single)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder} has its weights in {pickles[0]} only, a pickle, which can run any code when it is read; convert "
            "it where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new) in transformers"
        )
    raise InputError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")


def _sharded(folder: Path, index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map from tensors to files")
    keys: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise InputError(f"{index} names the file {shard!r}; only a safetensors file beside the index will do")
        path = folder / shard
        if not path.is_file():
            raise InputError(f"{path} is missing; {index.name} lists it")
        if path not in keys:
            keys[path] = _keys(path)
        if name not in keys[path]:
            raise InputError(f"{path}: tensor {name} is missing; {index.name} lists it there")
    # with what a shard holds beyond the index, so that a tensor without a place is noticed
    present = {name: path for path, names in keys.items() for name in names}
    return present | {name: folder / shard for name, shard in weight_map.items()}


def _keys(path: Path) -> set[str]:
    with _open(path) as file:
        return set(file.keys())


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file, or is truncated: {error}") from error
