"""GGUFCheckpoint: a GGUF file as a checkpoint with Hugging Face's names, tensor layout and configuration.

llama.cpp's converter renames the tensors, and for the "llama" architecture (Llama, SmolLM, Mistral) it reorders
the rows of q and k, because its rotary embedding turns neighbours (2i, 2i+1) where Hugging Face's turns (i, i+D/2).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.errors import InputError
from minilora.formats.gguf.file import GGUFFile
from minilora.models import ModelConfig, inverse_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_NAMES = {hugging_face: gguf for gguf, hugging_face in NAMES.items()}
ROPE_FACTORS = "rope_freqs.weight"  # not a weight: what Llama 3 divides each rotary frequency by


class GGUFCheckpoint:
    """The tensors and the configuration of a GGUF file of the llama, qwen2 or qwen3 architecture.

    Raises InputError, naming the file and the key or tensor, for anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(path)
        self.config = self._config()
        self._gguf_names = {_hugging_face_name(name): name for name in self.file.tensors if name != ROPE_FACTORS}

    @property
    def dtype(self) -> torch.dtype:
        """What the embedding is stored in; bfloat16 where that is in blocks of fewer bits."""
        return self.file.dtype(self._gguf_names["model.embed_tokens.weight"]) or torch.bfloat16

    def names(self) -> Iterator[str]:
        """Hugging Face's name of every tensor in the file."""
        return iter(self._gguf_names)

    def where(self, name: str) -> str:
        """File and tensor as an error message names them."""
        return f"{self.path}: tensor {self._gguf_names.get(name, name)}"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, in PyTorch's order."""
        return self.file.tensors[self._gguf_names[name]].shape

    def read(self, name: str) -> Tensor:
        """A tensor's values, floating point, in Hugging Face's order of rows."""
        tensor = self.file.read(self._gguf_names[name])
        if self.config.model_type == "llama" and name.endswith(("q_proj.weight", "q_proj.bias")):
            return halves_from_pairs(tensor, self.config.num_attention_heads)
        if self.config.model_type == "llama" and name.endswith(("k_proj.weight", "k_proj.bias")):
            return halves_from_pairs(tensor, self.config.num_key_value_heads)
        return tensor

    def _config(self) -> ModelConfig:
        metadata, tensors = self.file.metadata, self.file.tensors
        architecture = metadata.get("general.architecture")
        if metadata.get("general.type") == "adapter":
            raise InputError(f"{self.path} is an adapter for llama.cpp, not a model: load_adapter reads PEFT folders")
        if architecture not in ARCHITECTURES:
            raise InputError(
                f"{self.path}: architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
            )

        def value(key: str, default: Any = None) -> Any:
            return metadata.get(f"{architecture}.{key}", default)

        for required in ("embedding_length", "block_count", "attention.head_count", "attention.layer_norm_rms_epsilon"):
            if value(required) is None:
                raise InputError(f"{self.path}: the key {architecture}.{required} is missing")
        if metadata.get("split.count", 0) > 1:
            raise InputError(
                f"{self.path} is one of {metadata['split.count']} parts: join them with llama.cpp's gguf-split --merge"
            )
        if value("expert_count"):
            raise InputError(f"{self.path}: a mixture of {value('expert_count')} experts is not supported")
        if "token_embd.weight" not in tensors:
            raise InputError(f"{self.path}: tensor token_embd.weight is missing")
        head_dim = value("attention.key_length", value("embedding_length") // value("attention.head_count"))
        if value("rope.dimension_count", head_dim) != head_dim:
            raise InputError(
                f"{self.path}: rotary embeddings of only {value('rope.dimension_count')} of {head_dim} dimensions "
                "are not supported"
            )
        scaling = value("rope.scaling.type", "none")
        rope_scaling = None if scaling == "none" else {"rope_type": scaling, "factor": value("rope.scaling.factor")}
        hf = {
            "model_type": architecture,
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "hidden_size": value("embedding_length"),
            "intermediate_size": value("feed_forward_length"),
            "num_hidden_layers": value("block_count"),
            "num_attention_heads": value("attention.head_count"),
            "num_key_value_heads": value("attention.head_count_kv", value("attention.head_count")),
            "head_dim": head_dim,
            "max_position_embeddings": value("context_length"),
            "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
            "rope_theta": value("rope.freq_base", 10000.0),
            "rope_scaling": rope_scaling,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
            "tie_word_embeddings": "output.weight" not in tensors,
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        }
        if ROPE_FACTORS in tensors:
            hf["rope_scaling"] = self._llama3_scaling(hf)
        return ModelConfig.from_hf(hf, source=str(self.path))

    def _llama3_scaling(self, hf: dict[str, Any]) -> dict[str, Any]:
        """The rope_scaling whose division of the frequencies is the one stored in the file.

        The converter stores the quotients and drops the four numbers they came from; every Llama 3.1 to 3.3 has
        the same three of them and its largest quotient is the fourth.
        """
        factors = self.file.read(ROPE_FACTORS)
        scaling = {
            "rope_type": "llama3",
            "factor": round(float(factors.max()), 4),  # a quotient of float32 numbers: 8.000001
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        plain = ModelConfig.from_hf({**hf, "rope_scaling": None}, source=str(self.path))
        scaled = ModelConfig.from_hf({**hf, "rope_scaling": scaling}, source=str(self.path))
        quotients = inverse_frequencies(plain) / inverse_frequencies(scaled)
        # two float32 roundings each: 1e-5 is far above them and far below any other choice of the four numbers
        if factors.shape != quotients.shape or not torch.allclose(factors, quotients, rtol=1e-5):
            raise InputError(f"{self.path}: tensor {ROPE_FACTORS} is not Llama 3's scaling, which alone is supported")
        return scaling


def _hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; a name that is not known stays as it is."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in NAMES:
        return name
    layer = f"model.layers.{match[1]}." if match[1] is not None else ""
    return f"{layer}{NAMES[match[2]]}.{match[3]}"


def gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight, for the tensors that a Transformer has."""
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert match is not None
    block = f"blk.{match[1]}." if match[1] is not None else ""
    return f"{block}{GGUF_NAMES[match[2]]}.{match[3]}"


def halves_from_pairs(w: Tensor, heads: int) -> Tensor:
    """Undo the converter's order of a head's rows: 0, D/2, 1, D/2 + 1, ... back to 0, 1, 2, ..."""
    return w.view(heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def pairs_from_halves(w: Tensor, heads: int) -> Tensor:
    """The converter's order of each head's rows, of a weight, a bias or a LoRA's B: 0, D/2, 1, D/2 + 1, ..."""
    return w.view(heads, 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)
