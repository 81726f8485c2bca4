"""save_pretrained: a model as a Hugging Face folder, its active adapters merged into the weights; dense, or in NF4."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from minilora.adapters import dense_tensors, layer_and_acting, layers_with_weights
from minilora.errors import InputError
from minilora.formats.atomic import atomic_files
from minilora.models import Transformer, require_own_model
from minilora.nf4 import NF4Linear, bitsandbytes
from minilora.progress import progress_bar
from minilora.text import Tokenizer, require_own_tokenizer, save_tokenizer

INDEX = "model.safetensors.index.json"


def save_pretrained(
    model: Transformer,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    in_4_bits: bool = False,
) -> None:
    """Write a model and its tokenizer as a folder that transformers loads, the active adapters merged.

    W + Σ s·BA over the active adapters, W dequantized or original, is computed in float32 and rounded once. Only one
    shard is in memory at a time, and the model stays as it is. A failure leaves an existing folder as it was; on
    success its older weights go and its other files stay. `merge_report(model)` says what each format loses,
    docs/merging.md what to do about it.

    Args:
        model: The model, with or without adapters.
        tokenizer: Its tokenizer.
        folder: Where to write config.json, the weights, generation_config.json and the tokenizer's files.
        dtype: Of the weights; by default that of the checkpoint the model came from, whatever it computes in: bfloat16
            for a quantized GGUF file, the embedding's for a model made otherwise.
        max_shard_bytes: Most bytes in a file; a larger layer stands alone.
        in_4_bits: Write NF4 layers as they are, in the layout of bitsandbytes, which transformers loads too: for the
            result of `merge_to_nf4`, and for base models. Otherwise all is dense: rounding to 4 bits would erase most
            adapters, as does loading the folder with quantize="nf4".

    Raises:
        InputError: if merging gives NaN or infinity, or in_4_bits finds an adapter on an NF4 layer, naming the layer;
            if the folder cannot be written; and for a model of transformers, which has a method of this name: after
            `unload(model, merge=True)`.
    """
    require_own_model(model, "with transformers, unload(model, merge=True), then model.save_pretrained(folder)")
    require_own_tokenizer(tokenizer)
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder to save the model in")
    layers = layers_with_weights(model)
    dtype = dtype or saved_dtype(model)
    config = dataclasses.replace(model.config, tie_word_embeddings="lm_head" not in layers)
    values = {**config.to_hf(), "torch_dtype": str(dtype).removeprefix("torch.")}
    if in_4_bits:
        values["quantization_config"] = _quantization_config(layers, dtype)
    try:
        with atomic_files(folder) as temporary:
            _write_weights(layers, temporary, dtype, max_shard_bytes, in_4_bits)
            _write_json(temporary / "config.json", values)
            _write_json(temporary / "generation_config.json", _generation_config(model, tokenizer))
            save_tokenizer(tokenizer, temporary)
            written = {file.name for file in temporary.iterdir()}
        for file in [*folder.glob("model*.safetensors"), folder / INDEX]:
            if file.name not in written:
                file.unlink(missing_ok=True)  # weights of an earlier model
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write the model to {folder}: {error}") from None


def saved_dtype(model: Transformer) -> torch.dtype:
    """What save_pretrained writes unless it is told otherwise."""
    return model.checkpoint_dtype or model.model.embed_tokens.weight.dtype


def _quantization_config(layers: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, Any]:
    plain = {path: layer_and_acting(layer)[0] for path, layer in layers.items()}
    in_nf4 = [layer for layer in plain.values() if isinstance(layer, NF4Linear)]
    if not in_nf4:
        raise InputError("in_4_bits: the model has no layer in NF4; leave it out, or call merge_to_nf4 before")
    dense = [path for path, layer in plain.items() if isinstance(layer, nn.Linear)]
    return bitsandbytes.quantization_config(in_nf4[0].offset is not None, dtype, sorted({*dense, "lm_head"}))


def _tensors(path: str, layer: nn.Module, dtype: torch.dtype, in_4_bits: bool) -> dict[str, Tensor]:
    """What stands for the layer in the file."""
    base, adapters = layer_and_acting(layer)
    if not (in_4_bits and isinstance(base, NF4Linear)):
        return dense_tensors(path, layer, dtype)
    if adapters:
        raise InputError(f"{path} has an active adapter, which rounding to 4 bits would erase: call merge_to_nf4 first")
    tensors = bitsandbytes.packed(f"{path}.weight", base.quantized())
    if base.bias is not None:
        tensors[f"{path}.bias"] = base.bias.detach().to("cpu", dtype)
    return tensors


def _write_weights(
    layers: dict[str, nn.Module], folder: Path, dtype: torch.dtype, max_shard_bytes: int, in_4_bits: bool
) -> None:
    """model.safetensors, or shards of at most `max_shard_bytes` (a larger layer stands alone) with their index."""
    sizes = {path: _nbytes(layer, dtype, in_4_bits) for path, layer in layers.items()}
    from huggingface_hub import split_state_dict_into_shards_factory

    shards = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    weight_map: dict[str, str] = {}
    with progress_bar("Saving the model", sum(sizes.values()), "%") as advance:
        for file, paths in shards.filename_to_tensors.items():
            tensors: dict[str, Tensor] = {}
            for path in paths:
                tensors |= _tensors(path, layers[path], dtype, in_4_bits)
                advance(sizes[path])
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
    if shards.is_sharded:
        _write_json(folder / INDEX, {"metadata": shards.metadata, "weight_map": weight_map})


def _nbytes(layer: nn.Module, dtype: torch.dtype, in_4_bits: bool) -> int:
    """What a layer's weights and bias take in the file; in 4 bits without the tables, a kilobyte."""
    base, _ = layer_and_acting(layer)
    if in_4_bits and isinstance(base, NF4Linear):
        return sum(tensor.nbytes for tensor in (*base.buffers(), *base.parameters()))
    return sum(map(math.prod, shapes(layer).values())) * dtype.itemsize


def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of a layer's weight, dense, and of its bias if it has one, by these names."""
    base, _ = layer_and_acting(layer)
    weight = (base.out_features, base.in_features) if isinstance(base, NF4Linear) else tuple(base.weight.shape)
    return {"weight": weight} | ({} if getattr(base, "bias", None) is None else {"bias": weight[:1]})


def _generation_config(model: Transformer, tokenizer: Tokenizer) -> dict[str, object]:
    """Where generation starts, stops and pads: the ids that transformers' generate takes from this file."""
    stops = list(dict.fromkeys([*model.config.eos_token_ids, *tokenizer.eos_token_ids]))
    return {
        "bos_token_id": model.config.bos_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": model.config.pad_token_id,
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
