"""save_gguf: a model, its active adapters merged into the weights, as one file for llama.cpp and Ollama.

The names of the keys are those of the `gguf` package; formats/gguf/weights.py reads the file back.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from minilora.adapters import dense_tensors, layer_and_acting, layers_with_weights
from minilora.errors import InputError
from minilora.formats.gguf.vocabulary import vocabulary_metadata
from minilora.formats.gguf.weights import ROPE_FACTORS, gguf_name, pairs_from_halves
from minilora.formats.gguf.writer import write_gguf
from minilora.formats.ollama import write_modelfile
from minilora.models import ModelConfig, Transformer, inverse_frequencies, require_own_model
from minilora.nf4 import NF4Linear
from minilora.text import Tokenizer, require_own_tokenizer

OutType = Literal["f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
# llama.cpp has one architecture for the two, and no sliding windows in any of these
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def save_gguf(model: Transformer, tokenizer: Tokenizer, file: str | Path, *, outtype: OutType = "q8_0") -> None:
    """Write the model, its tokenizer and its chat template as a GGUF file, and a Modelfile for Ollama beside it.

    W + Σ s·BA over the active adapters, W dequantized or original, is computed in float32 and rounded once, to
    `outtype`: 32, 16, 16, 8.5, 6, 5.5, 5 or 4.5 bits a weight, in the order of the list. In the types of 4 and 5 bits
    the embedding and the head take q8_0; norms and biases are float32 in all. Only one layer is in memory at a time,
    and the model stays as it is. The file is written beside its place, so that a failure leaves one that was there.
    A model with a sliding window is written with that context length, within which the window makes no difference.
    Raises InputError, naming what it is, for what the file cannot hold: a tokenizer or a RoPE scaling, rows that do not
    divide into a type's blocks, NaN, infinity or overflow; and for a model or a tokenizer of transformers.
    Format: ggml/docs/gguf.md, and what llama.cpp's convert_hf_to_gguf.py makes of it.
    """
    require_own_model(model, "with transformers, unload(model, merge=True), then llama.cpp's convert_hf_to_gguf.py")
    require_own_tokenizer(tokenizer)
    if outtype not in get_args(OutType):
        raise InputError(f"outtype {outtype!r} is not one of {', '.join(get_args(OutType))}")
    if model.config.model_type == "qwen3" and model.config.qkv_bias:
        raise InputError("llama.cpp reads no biases in its architecture qwen3, and this model has them on q, k and v")
    file = checked_path(file)
    layers = layers_with_weights(model)
    metadata = _metadata(model.config, file.stem, outtype)
    metadata |= vocabulary_metadata(tokenizer, model.config.vocab_size, model.config.eos_token_ids)
    plan: dict[str, tuple[tuple[int, ...], str]] = {}
    for path, layer in layers.items():
        for name, shape in _shapes(layer).items():
            plan[gguf_name(f"{path}.{name}")] = shape, _type_of(path, shape, outtype)
    factors = _rope_factors(model.config)
    if factors is not None:
        plan = {ROPE_FACTORS: (tuple(factors.shape), "F32"), **plan}
    write_gguf(file, ARCHITECTURES[model.config.model_type], metadata, plan, _tensors(model.config, layers, factors))
    write_modelfile(tokenizer, file)


def checked_path(file: str | Path) -> Path:
    """The absolute path. Raises InputError for one that other tools, and `load`, would not take for GGUF."""
    file = Path(file).absolute()
    if file.suffix != ".gguf":
        raise InputError(f"{file}: the name of a GGUF file ends in .gguf")
    if file.is_dir():
        raise InputError(f"{file} is a folder; name a file")
    return file


def in_gguf_order(config: ModelConfig, path: str, rows: Tensor) -> Tensor:
    """What has a row for each output of a layer, in the order of the file: in "llama", q's and k's heads in pairs."""
    if ARCHITECTURES[config.model_type] == "llama" and path.endswith("q_proj"):
        return pairs_from_halves(rows, config.num_attention_heads)
    if ARCHITECTURES[config.model_type] == "llama" and path.endswith("k_proj"):
        return pairs_from_halves(rows, config.num_key_value_heads)
    return rows


def _metadata(config: ModelConfig, name: str, outtype: str) -> dict[str, Any]:
    """The keys that describe the model's shape."""
    import gguf

    general, llm, attention, rope = gguf.Keys.General, gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
    file_type = gguf.LlamaFileType["ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"]
    window = min((size for size in config.sliding_windows if size is not None), default=None)
    of_architecture: dict[str, Any] = {
        llm.VOCAB_SIZE: config.vocab_size,
        llm.CONTEXT_LENGTH: min(config.max_position_embeddings, window or config.max_position_embeddings),
        llm.EMBEDDING_LENGTH: config.hidden_size,
        llm.BLOCK_COUNT: config.num_hidden_layers,
        llm.FEED_FORWARD_LENGTH: config.intermediate_size,
        attention.HEAD_COUNT: config.num_attention_heads,
        attention.HEAD_COUNT_KV: config.num_key_value_heads,
        attention.KEY_LENGTH: config.head_dim,
        attention.VALUE_LENGTH: config.head_dim,
        attention.LAYERNORM_RMS_EPS: config.rms_norm_eps,
        rope.DIMENSION_COUNT: config.head_dim,
        rope.FREQ_BASE: config.rope_theta,
    }
    if config.rope_scaling is not None and config.rope_scaling["rope_type"] == "linear":
        of_architecture[rope.SCALING_TYPE] = gguf.RopeScalingType.LINEAR.value
        of_architecture[rope.SCALING_FACTOR] = float(config.rope_scaling["factor"])
    return {
        general.TYPE: gguf.GGUFType.MODEL,
        general.NAME: name,
        general.FILE_TYPE: int(file_type),
        general.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
    } | {key.format(arch=ARCHITECTURES[config.model_type]): value for key, value in of_architecture.items()}


def _rope_factors(config: ModelConfig) -> Tensor | None:
    """What Llama 3's scaling divides each rotary frequency by, which the file holds in the place of its numbers."""
    if config.rope_scaling is None or config.rope_scaling["rope_type"] != "llama3":
        return None
    if ARCHITECTURES[config.model_type] != "llama":
        raise InputError(f"llama.cpp has no llama3 RoPE scaling in its architecture {config.model_type}")
    return inverse_frequencies(replace(config, rope_scaling=None)) / inverse_frequencies(config)


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    base, _ = layer_and_acting(layer)
    weight = (base.out_features, base.in_features) if isinstance(base, NF4Linear) else tuple(base.weight.shape)
    return {"weight": weight} | ({} if getattr(base, "bias", None) is None else {"bias": weight[:1]})


def _type_of(path: str, shape: tuple[int, ...], outtype: str) -> str:
    if len(shape) == 1:
        return "F32"
    outside = path in ("model.embed_tokens", "lm_head")  # where an error reaches every token
    return "Q8_0" if outside and outtype.startswith(("q4", "q5")) else outtype.upper()


def _tensors(config: ModelConfig, layers: dict[str, nn.Module], factors: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """What the file holds, in its order of layers."""
    if factors is not None:
        yield ROPE_FACTORS, factors
    for path, layer in layers.items():
        for name, tensor in dense_tensors(path, layer, torch.float32).items():
            yield gguf_name(name), in_gguf_order(config, path, tensor)
