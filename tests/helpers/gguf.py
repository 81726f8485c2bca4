"""Writes a transformers model as GGUF the way llama.cpp's converter does, with the gguf package's names."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,  # llama.cpp makes no difference between them
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """The model's tensors in float32 under llama.cpp's names."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if architecture == gguf.MODEL_ARCH.LLAMA and ".q_proj." in name:
            array = permute(array, config.num_attention_heads)
        if architecture == gguf.MODEL_ARCH.LLAMA and ".k_proj." in name:
            array = permute(array, config.num_key_value_heads)
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    return tensors


def gguf_metadata(model: Any) -> dict[str, Any]:
    """The keys that describe the model's shape, without the architecture they begin with."""
    config = model.config
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim if hasattr(config, "head_dim") else None,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def write_gguf(path: Path, architecture: str, metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A GGUF file; a metadata key with a colon in front stands for itself, every other is the architecture's."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        key = key[1:] if key.startswith(":") else f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, model: Any, metadata: dict[str, Any] | None = None, **tensors: np.ndarray) -> Path:
    """The model as GGUF, with further or other keys and tensors."""
    architecture = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]]
    return write_gguf(path, architecture, gguf_metadata(model) | (metadata or {}), gguf_tensors(model) | tensors)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(output, torch.Tensor) else output.logits
