"""PEFT's adapter folder, both ways.

adapter_config.json        the configuration, in PEFT's keys
adapter_model.safetensors  base_model.model.<path of the layer>.lora_A.weight (r, in) and .lora_B.weight (out, r);
                           the adapter's name is not in the keys; beside updates:
                               .base_layer.bias, or .bias of what has no update    the adapter's own bias
                               .weight, .bias … of a module                        its copy of a saved module
                               .token_adapter.trainable_tokens_delta               its rows of an embedding
                           and of the base model what peft_base.py says
README.md                  a model card

PEFT puts biases into its base model, where they stay when the adapter is switched off; so it takes no second adapter
beside one with biases.

Format: peft 0.21.2, `PeftModel.save_pretrained`; weights in several files as transformers divides them.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo import OptimizedModule  # what torch.compile returns

from minilora.adapters import (
    Adapter,
    AdapterConfig,
    LoRA,
    Part,
    TrainedCopy,
    TransposedLinearKind,
    adapter_class,
    adapter_names,
    adapters_named,
    adapters_to_write,
    attach,
    build_adapters,
    check_derived_start,
    config_class,
    find_targets,
    name_of,
    not_derivable,
    refuse_merged,
    tied_layers,
)
from minilora.errors import InputError
from minilora.formats.atomic import atomic_files
from minilora.formats.peft_base import NewRows, embedding_tensors, put_into_the_base, was_resized, without_the_base
from minilora.models import Transformer

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
SIGNATURE = "Trained with minilora, saved in PEFT's format"  # of a model card that may be written anew
PREFIX = "base_model.model."  # of the keys
INDEX = f"{WEIGHTS}.index.json"  # where the weights are in several files

# PEFT's keys that do not change what an adapter computes, whatever their value.
HARMLESS = {
    "auto_mapping", "ensure_weight_tying", "inference_mode", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip

# Keys that tools which read the folder (servers, converters) expect beside the shared ones.
WRITTEN = {
    "auto_mapping": None, "bias": "none", "inference_mode": True, "layers_pattern": None,
    "layers_to_transform": None, "lora_bias": False, "modules_to_save": None, "revision": None,
}  # fmt: skip


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    as_lora: bool = False,
    *,
    save_embedding_layers: bool | str = "auto",
) -> None:
    """Write one adapter as a folder that PEFT loads; tensors keep their dtype (float32 masters).

    A failure leaves an adapter that was there as it was; other files in the folder are not touched.

    Args:
        model: The model that the adapter is on, also inside torch.compile's or a data-parallel wrapper.
        folder: Where to write, made if need be.
        name: Which adapter.
        as_lora: Write the plain LoRA of twice the rank that an adapter of PiSSA or OLoRA equals, which any tool serves,
            and not the adapter as it is, for tools that derive its start from the base weights again, as PEFT does. A
            start that cannot be derived again is written so in any case: minilora/adapters/start.py.
        save_embedding_layers: Write the base model's embedding and head too: True, False, or "auto": where a
            transformers model was resized for new tokens, so that its vocabulary is not that of its config.json.

    Raises:
        InputError: where the model has no adapter of that name, the folder cannot be written, as_lora is asked of
            what is no LoRA, or the embedding of a merged model or of one that has none.
    """
    if save_embedding_layers not in (True, False, "auto"):
        raise InputError(f"save_embedding_layers={save_embedding_layers!r} is not True, False or 'auto'")
    model = _without_wrappers(model)
    adapters = adapters_to_write(adapters_named(model, name), as_lora)
    parameters, config = _by_peft_key(adapters), _peft_config(model, adapters)
    if save_embedding_layers == "auto":
        save_embedding_layers = was_resized(model, config["base_model_name_or_path"])
    if save_embedding_layers:
        base = embedding_tensors(model, adapters)
        parameters = {f"{PREFIX}{key}": tensor for key, tensor in base.items()} | parameters
    # A tied pair has one tensor under two keys, which the format does not allow.
    tensors = {key: parameter.detach().clone().contiguous() for key, parameter in parameters.items()}
    card = Path(folder) / CARD
    is_another_s = card.is_file() and SIGNATURE not in card.read_text(encoding="utf-8", errors="replace")
    try:
        with atomic_files(Path(folder)) as temporary:
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            if not is_another_s:
                (temporary / CARD).write_text(_model_card(config), encoding="utf-8")
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (temporary / CONFIG).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write the adapter to {folder}: {error}") from None


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    is_trainable: bool = True,
    key_mapping: Mapping[str, str] | None = None,
) -> None:
    """Put the adapter that PEFT or `save_adapter` wrote on the model, active and ready to train on.

    What the file holds of the base model, as PEFT writes it beside an adapter of an embedding, must be the model's own;
    but for the last rows of an embedding and head, those of new tokens, which the model is given, as PEFT does.

    Args:
        model: The base model.
        folder: With adapter_config.json and adapter_model.safetensors, or its shards.
        name: What the adapter is called on the model.
        is_trainable: False leaves it frozen, for inference, until `set_adapter`.
        key_mapping: As PEFT's, names here for layers that are called otherwise in the file: {regular expression:
            replacement}, of which the first that is found counts. By default what a transformers model says of itself.

    Raises:
        InputError: for a method or option that is not known, a missing or unexpected tensor, a wrong shape or a damaged
            file, naming the file and the option or key in it. The model is then unchanged.
    """
    model = _without_wrappers(model)
    adapters, new_rows = _read_adapters(model, folder, key_mapping)
    if new_rows and adapter_names(model):
        raise InputError(_other_rows(folder, f"{adapter_names(model)} may use: unload(model) first"))
    with put_into_the_base(new_rows):
        if new_rows:  # a start such as PiSSA's follows from the base weights
            adapters, _ = _read_adapters(model, folder, key_mapping)
        attach(model, adapters, name)
    if not is_trainable:
        for adapter in adapters.values():
            adapter.requires_grad_(False)


@torch.no_grad()
def swap_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", *, key_mapping: Mapping[str, str] | None = None
) -> None:
    """Put the numbers of an adapter in a folder into the place of those of an adapter on the model.

    They go into the same memory, so that a compiled model and a CUDA graph go on with them: a compiled one is compiled
    again where the scaling is another. What trains, what is active, and lora_dropout stay.

    Args:
        model: A model with the adapter.
        folder: As in `load_adapter`; its adapter must be of the same method, on the same layers and of the same ranks.
        name: The adapter on the model.
        key_mapping: As in `load_adapter`.

    Raises:
        InputError: as `load_adapter` does, for a merged model, and where the two adapters are not alike, naming the
            layer. The adapter is then what it was.
    """
    model = _without_wrappers(model)
    refuse_merged(model)
    here, (there, new_rows) = adapters_named(model, name), _read_adapters(model, folder, key_mapping)
    if new_rows:
        raise InputError(_other_rows(folder, "the model goes on with: load it anew"))
    if here.keys() != there.keys():
        raise InputError(
            f"{folder} is on other layers than {name!r}: {_some(here.keys() ^ there.keys())}; load it anew"
        )
    for path, new in there.items():
        shapes = [{key: tensor.shape for key, tensor in _tensors_of(each).items()} for each in (here[path], new)]
        if type(here[path]) is not type(new) or shapes[0] != shapes[1]:
            raise InputError(f"{folder} has another adapter on {path} than {name!r}, in method or rank: load it anew")
    for path, new in there.items():
        old = here[path]
        for key, tensor in _tensors_of(new).items():
            _tensors_of(old)[key].copy_(tensor)
        old.config = new.config
        for number in ("lora_alpha", "scaling"):
            if hasattr(new, number):
                setattr(old, number, getattr(new, number))


def _other_rows(folder: str | Path, which: str) -> str:
    return f"{folder} has other rows for the new tokens of the embedding than those that {which}"


def _tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    return {**dict(adapter.named_parameters()), **dict(adapter.named_buffers()), **adapter.shared_tensors()}


def _read_adapters(
    model: nn.Module, folder: str | Path, key_mapping: Mapping[str, str] | None
) -> tuple[dict[str, Adapter], NewRows]:
    """The adapters of a folder by the path of their layer, not on the model; and what it has to put into the base."""
    config_path, weights_path = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    config = _read_config(config_path)
    tensors = _read_tensors(weights_path)
    tied = tuple(_key(path, "") for path in tied_layers(model)[1:])
    if getattr(config, "ensure_weight_tying", False) and not any(key.startswith(tied) for key in tensors):
        config = replace(config, ensure_weight_tying=False)  # type: ignore[call-arg]  # PEFT found nothing to tie
    try:
        adapters = build_adapters(model, config, find_targets(model, config))
        check_derived_start(adapters)
    except InputError as error:
        raise InputError(f"{config_path} does not fit the model: {error}") from None
    parameters = _by_peft_key(adapters)
    tensors = _under_the_model_s_names(model, tensors, parameters, key_mapping)
    tensors, new_rows = without_the_base(model, tensors, parameters.keys(), weights_path)
    _check_tensors(tensors, parameters, weights_path)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
        for key, parameter in parameters.items() if getattr(config, "ensure_weight_tying", False) else ():
            if not torch.equal(parameter, tensors[key].to(parameter)):
                raise InputError(f"{weights_path}: {key} differs from what ensure_weight_tying makes one with it")
    for adapter in adapters.values():
        if isinstance(adapter, LoRA):
            adapter.awaits_data = False  # what its initialization would have found is in the file
    return adapters, new_rows


def _without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the data-parallel wrappers, whose names belong into no file."""
    while isinstance(model, OptimizedModule | nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


# --- keys and tensors ------------------------------------------------------------------------------------------------


def _by_peft_key(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The tensors of the adapters, given by the path of their layer, under the keys that PEFT gives them."""
    shared = (adapter.shared_tensors() for adapter in adapters.values())  # the same ones from each
    tensors = {f"base_model.{key}": tensor for of_adapter in shared for key, tensor in of_adapter.items()}
    return tensors | {
        _key(path, end): tensor for path, adapter in adapters.items() for end, tensor in adapter.saved_tensors().items()
    }


def _key(path: str, end: str) -> str:
    return f"{PREFIX}{path}.{end}"


def _under_the_model_s_names(
    model: nn.Module, tensors: dict[str, Tensor], wanted: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None
) -> dict[str, Tensor]:
    """The tensors by the keys that the model's layers have now, where those in the file are others.

    Those of wrappers (torch.compile, DDP) are cut out; key_mapping says more; and a transformers model knows what its
    layers were called before they were renamed, as those of vision-language models were in 2025.
    """
    if tensors.keys() == wanted.keys():
        return tensors
    renamings = _renamings(model) if key_mapping is None else [partial(_replaced, key_mapping)]
    renamed = {}
    for key, tensor in tensors.items():
        path, end = _path_and_end(name_of(key))
        if f"{PREFIX}{path}{end}" not in wanted:
            path = path.removeprefix("module.")
            for rename in renamings:
                path = rename(path)
        found = f"{PREFIX}{path}{end}"
        renamed[found if found in wanted else key] = tensor
    return renamed if len(renamed) == len(tensors) else tensors


def _path_and_end(key: str) -> tuple[str, str]:
    """The layer's path, and what of the key follows it."""
    path, found, end = key.removeprefix(PREFIX).partition(".lora_")
    if not found:
        path, found, end = path.rpartition(".")
    return path, found + end


def _replaced(key_mapping: Mapping[str, str], path: str) -> str:
    """As PEFT does: by the first regular expression that is found in it."""
    for pattern, replacement in key_mapping.items():
        path, count = re.subn(pattern, replacement, path)
        if count:
            break
    return path


def _renamings(model: nn.Module) -> list[Callable[[str], str]]:
    if not type(model).__module__.startswith("transformers."):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before 5.0
        return []
    known = [each for each in get_model_conversion_mapping(cast(Any, model)) if isinstance(each, WeightRenaming)]
    return [lambda path: rename_source_key(f"{path}.weight", known, [])[0].removesuffix(".weight")]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    index = path.with_name(INDEX)
    if path.exists() or not index.exists():
        return _read_file(path)
    try:
        place = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: path.with_name(Path(name).name) for name in sorted(set(place.values()))}  # in this folder only
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{index} is not the index of a sharded safetensors file: {error!r}") from None
    files = {name: _read_file(shard) for name, shard in shards.items()}
    for key, name in place.items():
        if key not in files[name]:
            raise InputError(f"{path.with_name(name)} lacks {key}, which {INDEX} says it holds")
    return {key: tensor for tensors in files.values() for key, tensor in tensors.items()}


def _read_file(path: Path) -> dict[str, Tensor]:
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


def _check_tensors(tensors: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or unexpected:
        problems = [("lacks", missing), ("has the unexpected", unexpected)]
        raise InputError(f"{path} " + " and ".join(f"{verb} {_some(keys)}" for verb, keys in problems if keys))
    for key, tensor in wanted.items():
        if tensors[key].dtype.itemsize == 1 and tensors[key].is_floating_point():
            tensors[key] = tensors[key].float()  # PyTorch computes nothing in float8, and asks nothing of it
        if tensors[key].shape != tensor.shape:
            shapes = f"{tuple(tensors[key].shape)}, the model needs {tuple(tensor.shape)}"
            raise InputError(f"{path}: {key} has shape {shapes}")
        if tensor.is_floating_point() and not tensors[key].is_floating_point():
            raise InputError(f"{path}: {key} holds {tensors[key].dtype}, not floating-point numbers")
        if not tensors[key].isfinite().all():
            raise InputError(
                f"{path}: {key} holds NaN or infinity: its training had diverged, take an earlier checkpoint"
            )


def _some(keys: set[str]) -> str:
    shown = ", ".join(sorted(keys)[:6])
    return shown if len(keys) <= 6 else f"{shown} and {len(keys) - 6} more"


# --- configuration ---------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> AdapterConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        trained = path.parent / "adapter"  # where `train` puts it, inside its output_dir
        hint = f"; {trained} is one" if (trained / path.name).is_file() else ""
        raise InputError(f"{path} does not exist: {path.parent} is no adapter folder of PEFT's form{hint}") from None
    except NotADirectoryError:
        raise InputError(f"{path.parent} is a file: give the folder that it is in") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object")
    try:
        return _understood(values)
    except (InputError, TypeError, AttributeError) as error:  # the last two: a value of another kind
        raise InputError(f"{path}: {error}") from None


def _understood(values: dict[str, Any]) -> AdapterConfig:
    """The configuration that PEFT's keys and values mean. Raises InputError for one that has no code here."""
    kind = config_class(str(values.get("peft_type")))
    if not_derivable(values.get("init_lora_weights")):
        raise InputError(
            f"init_lora_weights={values['init_lora_weights']!r}: PEFT took this adapter's start out of its base"
            " weights, and the folder does not hold it; convert it where it was trained, with PEFT's"
            " save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    known = [field.name for field in fields(kind)]  # the same key, value and meaning in PEFT
    for key in sorted(values.keys() - set(known) - HARMLESS):
        if _is_used(key, values[key]):
            raise InputError(f"{key}={values[key]!r} is not supported")
    return kind(**{key: values[key] for key in known if values.get(key) is not None})


def _is_used(key: str, value: Any) -> bool:
    """True if a value of PEFT's configuration asks for something."""
    return not (value is None or value is False or value in ("", [], {}) or (key, value) == ("bias", "none"))


def _peft_config(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    targets = [path for path, adapter in adapters.items() if not isinstance(adapter, Part)]
    config = (adapters[targets[0]] if targets else next(iter(adapters.values()))).config
    values = {field.name: getattr(config, field.name) for field in fields(config)} | {"peft_type": config.peft_type}
    if str(config.target_modules).lower() == "all-linear":  # a server should not have to find out which layers that is
        values["target_modules"] = _shortest_names(model, config, targets)
    if getattr(config, "ensure_weight_tying", False) and adapters.keys() >= set(tied_layers(model)):
        # PEFT knows a tied pair by the name lm_head, and would leave another one's head out.
        copies = [path for path, adapter in adapters.items() if isinstance(adapter, TrainedCopy)]
        values |= {"target_modules": targets, "modules_to_save": copies or None}
    if "fan_in_fan_out" in values:  # as the layers are, whatever the user said
        values["fan_in_fan_out"] = any(isinstance(adapters[path].kind, TransposedLinearKind) for path in targets)
    if config.base_model_name_or_path is None:
        values["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    values |= {"task_type": config.task_type or _task_type(model)}
    values = WRITTEN | values
    lacking = {key: values.pop(key) for key in config.peft_lacks if key in values}
    if any(_is_used(key, value) for key, value in lacking.items()):
        values["target_modules"] = targets  # PEFT cannot be told which layers in the words of this configuration
    return adapter_class(config).peft_values(values, adapters)


def _task_type(model: nn.Module) -> str | None:
    """PEFT's name of what a language model does; of any other model None, or PEFT would ask it for methods it lacks."""
    if isinstance(model, Transformer):
        return "CAUSAL_LM"
    takes = getattr(model, "main_input_name", "input_ids")  # PEFT gives the model of a task its token ids, if no others
    if not hasattr(model, "prepare_inputs_for_generation") or takes != "input_ids":
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _shortest_names(model: nn.Module, config: AdapterConfig, targets: list[str]) -> list[str]:
    """The last parts of the targets' paths where these match no other module, else the whole paths."""
    last_parts = sorted({path.rpartition(".")[2] for path in targets})
    try:
        matched = find_targets(model, replace(config, target_modules=last_parts))
    except InputError:  # they match something that is not a linear layer
        matched = []
    return last_parts if matched == targets else targets


def _model_card(config: dict[str, Any]) -> str:
    base, method = config["base_model_name_or_path"], config["peft_type"]
    base_model = f"base_model: {json.dumps(base)}\n" if base else ""
    settings = [f"{key} {config[key]}, " for key in ("r", "lora_alpha", "alpha") if key in config]
    return f"""---
{base_model}library_name: peft
tags:
- {method.lower()}
- minilora
---

# Adapter{f" for {base}" if base else ""}

{method}: {"".join(settings)}on {config["target_modules"]}. {SIGNATURE}:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""
