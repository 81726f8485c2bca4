"""PEFT's adapter folder, both ways: adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minilora.adapters import adapter_parameters, add_adapter, lora_layers
from minilora.errors import InputError
from minilora.lora import LoRAConfig

_FIELDS = (
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights",
    "bias", "rank_pattern", "alpha_pattern", "task_type", "base_model_name_or_path",
)  # fmt: skip


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Write the adapter as PEFT would."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = adapter_parameters(model, name)
    if not parameters:
        raise InputError(f"no adapter named {name!r}")
    tensors = {f"base_model.model.{k}.weight": v.detach().contiguous() for k, v in parameters.items()}
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.adapters}
    config = next(iter(layers.values())).adapters[name].config
    fields = {key: getattr(config, key) for key in _FIELDS} | {
        "peft_type": "LORA", "inference_mode": True, "target_modules": sorted(layers),
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2))


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Read an adapter that PEFT or `save_adapter` wrote."""
    fields = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    add_adapter(model, LoRAConfig(**{key: fields[key] for key in _FIELDS if key in fields}), name)
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, name).items():
            parameter.copy_(tensors[f"base_model.model.{key}.weight"])
