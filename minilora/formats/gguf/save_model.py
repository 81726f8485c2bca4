"""save_gguf: a model, its active adapters merged into the weights, as one file for llama.cpp and Ollama.

The names of the keys are those of the `gguf` package; formats/gguf/weights.py reads the file back.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import torch
from torch import Tensor, nn

from minilora.adapters import dense_tensors, layers_with_weights
from minilora.errors import InputError
from minilora.formats.gguf.vocabulary import vocabulary_metadata
from minilora.formats.gguf.weights import ARCHITECTURES, KEYS, ROPE_FACTORS, gguf_names, in_gguf_order, rope_factors
from minilora.formats.gguf.writer import write_gguf
from minilora.formats.ollama import write_modelfile
from minilora.formats.save_pretrained import shapes
from minilora.models import ModelConfig, Transformer, require_own_model
from minilora.text import Tokenizer, require_own_tokenizer

OutType = Literal["f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


def save_gguf(model: Transformer, tokenizer: Tokenizer, file: str | Path, *, outtype: OutType = "q8_0") -> None:
    """Write a model, its tokenizer and its chat template as a GGUF file, and a Modelfile for Ollama beside it.

    W + Σ s·BA over the active adapters, W dequantized or original, is computed in float32 and rounded once. Only one
    layer is in memory at a time, and the model stays as it is. A failure leaves a file that was there. A model with a
    sliding window is written with that context length, within which the window makes no difference.

    Args:
        model: The model, with or without adapters.
        tokenizer: Its tokenizer.
        file: Where to write; its name ends in .gguf.
        outtype: Of the weights: f32, bf16, f16, q8_0, q5_1, q5_0, q4_1 or q4_0, which take 32, 16, 16, 8.5, 6, 5.5, 5
            or 4.5 bits a weight. In the types of 4 and 5 bits the embedding and the head take q8_0; norms and biases
            are float32 in all.

    Raises:
        InputError: for what the file cannot hold, naming what it is: a tokenizer or a RoPE scaling, rows that do not
            divide into a type's blocks, NaN, infinity or overflow; and for a model or a tokenizer of transformers.

    Source: ggml/docs/gguf.md, and what llama.cpp's convert_hf_to_gguf.py makes of it.
    """
    require_own_model(model, "with transformers, unload(model, merge=True), then llama.cpp's convert_hf_to_gguf.py")
    require_own_tokenizer(tokenizer)
    if outtype not in get_args(OutType):
        raise InputError(f"outtype {outtype!r} is not one of {', '.join(get_args(OutType))}")
    if model.config.model_type == "qwen3" and model.config.qkv_bias:
        raise InputError("llama.cpp reads no biases in its architecture qwen3, and this model has them on q, k and v")
    layers = layers_with_weights(model)
    metadata = _metadata(model.config, outtype)
    metadata |= vocabulary_metadata(tokenizer, model.config.vocab_size, model.config.eos_token_ids)
    factors = _rope_factors(model.config)
    plan = {name: (tuple(tensor.shape), "F32") for name, tensor in factors.items()}
    names = gguf_names(model.config)
    for path, layer in layers.items():
        for name, shape in shapes(layer).items():
            plan[names[f"{path}.{name}"]] = shape, _type_of(path, shape, outtype)
    file = Path(file)
    write_gguf(file, ARCHITECTURES[model.config.model_type], metadata, plan, _tensors(model.config, layers, factors))
    write_modelfile(tokenizer, file)


def _metadata(config: ModelConfig, outtype: str) -> dict[str, Any]:
    """The keys that describe the model's shape."""
    llm, rope = gguf.Keys.LLM, gguf.Keys.Rope
    file_type = gguf.LlamaFileType["ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"]
    lengths = config.max_position_embeddings, *config.sliding_windows
    of_architecture: dict[str, Any] = {key: getattr(config, name) for name, key in KEYS.items()} | {
        llm.VOCAB_SIZE: config.vocab_size,
        llm.CONTEXT_LENGTH: min(length for length in lengths if length is not None),
        gguf.Keys.Attention.VALUE_LENGTH: config.head_dim,
        rope.DIMENSION_COUNT: config.head_dim,
    }
    if config.rope_scaling is not None and config.rope_scaling["rope_type"] == "linear":
        of_architecture[rope.SCALING_TYPE] = gguf.RopeScalingType.LINEAR.value
        of_architecture[rope.SCALING_FACTOR] = float(config.rope_scaling["factor"])
    return {
        gguf.Keys.General.TYPE: gguf.GGUFType.MODEL,
        gguf.Keys.General.FILE_TYPE: int(file_type),
        **{key.format(arch=ARCHITECTURES[config.model_type]): value for key, value in of_architecture.items()},
    }


def _rope_factors(config: ModelConfig) -> dict[str, Tensor]:
    """The tensor that stands for the numbers of Llama 3's scaling, if the model has that."""
    if config.rope_scaling is None or config.rope_scaling["rope_type"] != "llama3":
        return {}
    if ARCHITECTURES[config.model_type] != "llama":
        raise InputError(f"llama.cpp has no llama3 RoPE scaling in its architecture {config.model_type}")
    return {ROPE_FACTORS: rope_factors(config)}


def _type_of(path: str, shape: tuple[int, ...], outtype: str) -> str:
    if len(shape) == 1:
        return "F32"
    outside = path in ("model.embed_tokens", "lm_head")  # where an error reaches every token
    return "Q8_0" if outside and outtype.startswith(("q4", "q5")) else outtype.upper()


def _tensors(
    config: ModelConfig, layers: dict[str, nn.Module], factors: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """What the file holds, in its order of layers."""
    yield from factors.items()
    names = gguf_names(config)
    for path, layer in layers.items():
        for name, tensor in dense_tensors(path, layer, torch.float32).items():
            yield names[name], in_gguf_order(config, name, tensor)
