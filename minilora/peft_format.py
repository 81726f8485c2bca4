"""PEFT's adapter folder, both ways.

adapter_config.json        the configuration, in PEFT's keys
adapter_model.safetensors  base_model.model.<path of the layer>.lora_A.weight (r, in) and .lora_B.weight (out, r);
                           the adapter's name is not in the keys
README.md                  a model card

Format: peft 0.21.2, `PeftModel.save_pretrained`.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.adapter import Adapter, AdapterConfig, config_class
from minilora.adapters import adapters_named, attach, build_adapters, find_targets
from minilora.errors import InputError

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"

# PEFT's keys that do not change what an adapter computes, whatever their value.
HARMLESS = {
    "auto_mapping", "ensure_weight_tying", "inference_mode", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip

# Values that stand for a feature which is not used, beside None, False and what is empty.
NEUTRAL = {"bias": "none"}

# Keys that tools which read the folder (servers, converters) expect beside the shared ones.
WRITTEN = {
    "auto_mapping": None, "bias": "none", "inference_mode": True, "layers_pattern": None,
    "layers_to_transform": None, "lora_bias": False, "modules_to_save": None, "revision": None,
}  # fmt: skip


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Write one adapter as a folder that PEFT loads; tensors keep their dtype (float32 masters).

    All files are written beside their places before the first is renamed into its own, so that a failure leaves an
    adapter that was there as it was, and other files in the folder are not touched.
    Raises InputError where the model has no adapter of that name, or the folder cannot be written.
    """
    parameters = _by_peft_key(adapters_named(model, name))
    tensors = {key: parameter.detach().contiguous() for key, parameter in parameters.items()}
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
    adapters = build_adapters(model, config, targets)
    parameters = _by_peft_key(adapters)
    _check_tensors(tensors, {key: tuple(p.shape) for key, p in parameters.items()}, Path(folder) / WEIGHTS)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
    attach(model, adapters, name)


# --- keys and tensors ------------------------------------------------------------------------------------------------


def _by_peft_key(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The tensors of the adapters, given by the path of their layer, under the keys that PEFT gives them."""
    shared = (adapter.shared_tensors() for adapter in adapters.values())  # the same ones from each
    tensors = {f"base_model.{key}": tensor for of_adapter in shared for key, tensor in of_adapter.items()}
    return tensors | {
        f"base_model.model.{path}.{adapter.peft_name(name)}": parameter
        for path, adapter in adapters.items()
        for name, parameter in adapter.named_parameters()
    }


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


def _check_tensors(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], path: Path) -> None:
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


def _read_config(path: Path) -> AdapterConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {path.parent} is not an adapter folder of PEFT's form") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object")
    try:
        kind = config_class(str(values.get("peft_type")))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    known = [field.name for field in fields(kind)]  # the same key, value and meaning in PEFT
    for key in sorted(values.keys() - set(known) - HARMLESS):
        if _is_used(key, values[key]):
            raise InputError(f"{path}: {key}={values[key]!r} is not supported")
    try:
        return kind(**{key: values[key] for key in known if values.get(key) is not None})
    except (InputError, TypeError, AttributeError) as error:  # a value out of range, or of another kind
        raise InputError(f"{path}: {error}") from None


def _is_used(key: str, value: Any) -> bool:
    """True if a value of PEFT's configuration asks for something."""
    return not (value is None or value is False or value in ("", [], {}) or value == NEUTRAL.get(key))


def _peft_config(model: nn.Module, name: str) -> dict[str, Any]:
    adapters = adapters_named(model, name)
    targets = list(adapters)
    config = adapters[targets[0]].config
    values = {field.name: getattr(config, field.name) for field in fields(config)} | {"peft_type": config.peft_type}
    if str(config.target_modules).lower() == "all-linear":  # a server should not have to find out which layers that is
        values["target_modules"] = _shortest_names(model, targets)
    if config.base_model_name_or_path is None:
        values["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    values = WRITTEN | values
    lacking = {key: values.pop(key) for key in config.peft_lacks if key in values}
    if any(_is_used(key, value) for key, value in lacking.items()):
        values["target_modules"] = targets  # PEFT cannot be told which layers in the words of this configuration
    return type(adapters[targets[0]]).peft_values(values, adapters)


def _shortest_names(model: nn.Module, targets: list[str]) -> list[str]:
    """The last parts of the targets' paths where these match no other module, else the whole paths."""
    last_parts = sorted({path.rpartition(".")[2] for path in targets})
    try:
        matched = find_targets(model, AdapterConfig(target_modules=last_parts))
    except InputError:  # they match something that is not a linear layer
        matched = []
    return last_parts if matched == targets else targets


def _model_card(config: dict[str, Any]) -> str:
    base = config["base_model_name_or_path"]
    header = [f"base_model: {json.dumps(base)}"] if base else []
    method = config["peft_type"]
    settings = [f"{key} {config[key]}, " for key in ("r", "lora_alpha", "alpha") if key in config]
    header += ["library_name: peft", "tags:", f"- {method.lower()}", "- minilora"]
    return "\n".join(
        [
            "---", *header, "---", "",
            f"# Adapter{f' for {base}' if base else ''}", "",
            f"{method}: {''.join(settings)}on {config['target_modules']}. "
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
