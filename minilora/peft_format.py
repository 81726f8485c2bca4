"""PEFT's adapter folder, both ways.

adapter_config.json        the configuration, in PEFT's keys
adapter_model.safetensors  base_model.model.<path of the layer>.lora_A.weight (r, in) and .lora_B.weight (out, r);
                           the adapter's name is not in the keys
README.md                  a model card

Format: peft 0.21.2, `PeftModel.save_pretrained`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.adapters import adapter_parameters, attach, find_targets, lora_layers, rank_and_alpha
from minilora.errors import InputError
from minilora.lora import LoRA, LoRAConfig, LoRALinear

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"

SHARED = [field.name for field in fields(LoRAConfig)]  # the same key, value and meaning in PEFT

# PEFT's keys that do not change what an adapter computes, whatever their value.
HARMLESS = {
    "auto_mapping", "ensure_weight_tying", "inference_mode", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip

# Keys that tools which read the folder (servers, converters) expect beside the shared ones.
WRITTEN = {
    "auto_mapping": None, "fan_in_fan_out": False, "inference_mode": True, "layers_pattern": None,
    "layers_to_transform": None, "lora_bias": False, "modules_to_save": None, "peft_type": "LORA", "revision": None,
    "use_dora": False,
}  # fmt: skip


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Write one adapter as a folder that PEFT loads; tensors keep their dtype (float32 masters).

    All files are written beside their places before the first is renamed into its own, so that a failure leaves an
    adapter that was there as it was, and other files in the folder are not touched.
    Raises InputError where the model has no adapter of that name, or the folder cannot be written.
    """
    parameters = adapter_parameters(model, name)
    tensors = {_peft_key(key): parameter.detach().contiguous() for key, parameter in parameters.items()}
    config = _peft_config(model, name)
    writers: dict[str, Callable[[Path], Any]] = {
        WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
        CARD: lambda path: path.write_text(_model_card(config), encoding="utf-8"),
        CONFIG: lambda path: path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"),
    }
    try:
        _write_together(Path(folder), writers)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write the adapter to {folder}: {error}") from None


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Put the adapter that PEFT or `save_adapter` wrote on the model, active and ready to train on.

    Raises InputError naming the file, and the option, key or shape in it, that is not as it must be: an adapter that is
    not a plain LoRA, a missing or unexpected tensor, a wrong shape, a damaged file. The model is then unchanged.
    """
    config = _read_config(Path(folder) / CONFIG)
    tensors = _read_tensors(Path(folder) / WEIGHTS)
    try:
        targets = find_targets(model, config)
    except InputError as error:
        raise InputError(f"{Path(folder) / CONFIG} does not fit the model: {error}") from None
    _check_tensors(tensors, _expected_shapes(model, config, targets), Path(folder) / WEIGHTS)
    attach(model, config, targets, name)
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, name).items():
            parameter.copy_(tensors[_peft_key(key)])


# --- keys and tensors ------------------------------------------------------------------------------------------------


def _peft_key(key: str) -> str:
    return f"base_model.model.{key}.weight"


def _expected_shapes(model: nn.Module, config: LoRAConfig, targets: list[str]) -> dict[str, tuple[int, int]]:
    shapes = {}
    for path in targets:
        layer = model.get_submodule(path)
        base = layer.base_layer if isinstance(layer, LoRALinear) else cast(nn.Linear, layer)
        r, _ = rank_and_alpha(config, path)
        shapes[_peft_key(f"{path}.lora_A")] = (r, base.in_features)
        shapes[_peft_key(f"{path}.lora_B")] = (base.out_features, r)
    return shapes


def _read_tensors(path: Path) -> dict[str, Tensor]:
    pickled = path.with_suffix(".bin")
    if not path.exists() and pickled.exists():
        raise InputError(
            f"{pickled} is a pickle, which can run code when it is read, and is refused; if you trust it, load it with"
            " PEFT and save it again: PeftModel.from_pretrained(base, folder).save_pretrained(folder)"
        )
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from None


def _check_tensors(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]], path: Path) -> None:
    missing, unexpected = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    if missing or unexpected:
        problems = [("lacks", missing), ("has the unexpected", unexpected)]
        raise InputError(f"{path} " + " and ".join(f"{verb} {_some(keys)}" for verb, keys in problems if keys))
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape:
            raise InputError(f"{path}: {key} has shape {tuple(tensors[key].shape)}, the model needs {shape}")
        if not tensors[key].is_floating_point():
            raise InputError(f"{path}: {key} holds {tensors[key].dtype}, not floating-point numbers")


def _some(keys: set[str], most: int = 6) -> str:
    shown = ", ".join(sorted(keys)[:most])
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"


# --- configuration ---------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> LoRAConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {path.parent} is not an adapter folder of PEFT's form") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else None
        raise InputError(f"{path}: peft_type is {kind!r}, only 'LORA' is supported")
    for key in sorted(values.keys() - set(SHARED) - HARMLESS):
        unused = values[key] is None or values[key] is False or values[key] in ("", [], {})
        if not unused:
            raise InputError(f"{path}: {key}={values[key]!r} is not supported")
    try:
        return LoRAConfig(**{key: values[key] for key in SHARED if values.get(key) is not None})
    except (InputError, TypeError, AttributeError) as error:  # a value out of range, or of another kind
        raise InputError(f"{path}: {error}") from None


def _peft_config(model: nn.Module, name: str) -> dict[str, Any]:
    layers = lora_layers(model)
    targets = [path for path, layer in layers.items() if name in layer.adapters]
    config = cast(LoRA, layers[targets[0]].adapters[name]).config
    values = {key: getattr(config, key) for key in SHARED}
    if str(config.target_modules).lower() == "all-linear":  # a server should not have to find out which layers that is
        values["target_modules"] = _shortest_names(model, targets)
    if config.base_model_name_or_path is None:
        values["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    return WRITTEN | values


def _shortest_names(model: nn.Module, targets: list[str]) -> list[str]:
    """The last parts of the targets' paths where these match no other module, else the whole paths."""
    last_parts = sorted({path.rpartition(".")[2] for path in targets})
    try:
        matched = find_targets(model, LoRAConfig(target_modules=last_parts))
    except InputError:  # they match something that is not a linear layer
        matched = []
    return last_parts if matched == targets else targets


def _model_card(config: dict[str, Any]) -> str:
    base = config["base_model_name_or_path"]
    header = [f"base_model: {json.dumps(base)}"] if base else []
    header += ["library_name: peft", "tags:", "- lora", "- minilora"]
    return "\n".join(
        [
            "---", *header, "---", "",
            f"# LoRA adapter{f' for {base}' if base else ''}", "",
            f"Rank {config['r']}, alpha {config['lora_alpha']}, on {config['target_modules']}. "
            "Trained with minilora, saved in PEFT's format:", "",
            "```python",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")',
            "```", "",
        ]
    )  # fmt: skip


def _write_together(folder: Path, writers: dict[str, Callable[[Path], Any]]) -> None:
    """Write every file under a temporary name, then rename them all; on failure the temporary ones are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            write(temporary[name])
        for name, path in temporary.items():
            path.replace(folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
