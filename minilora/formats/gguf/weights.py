"""GGUFCheckpoint: a GGUF file as a checkpoint with Hugging Face's names, tensor layout and configuration.

llama.cpp's converter renames the tensors, and for the "llama" architecture (Llama, SmolLM, Mistral) it reorders
the rows of q and k, because its rotary embedding rotates the pairs (2i, 2i+1) where Hugging Face's rotates (i, i+D/2).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import Keys
from torch import Tensor

from minilora.errors import InputError
from minilora.formats.gguf.file import GGUFFile
from minilora.models import ModelConfig, inverse_frequencies

# llama.cpp has one architecture for the first two, and no sliding windows in any of these
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

KEYS = {  # of config.json
    "hidden_size": Keys.LLM.EMBEDDING_LENGTH,
    "intermediate_size": Keys.LLM.FEED_FORWARD_LENGTH,
    "num_hidden_layers": Keys.LLM.BLOCK_COUNT,
    "num_attention_heads": Keys.Attention.HEAD_COUNT,
    "num_key_value_heads": Keys.Attention.HEAD_COUNT_KV,
    "head_dim": Keys.Attention.KEY_LENGTH,
    "max_position_embeddings": Keys.LLM.CONTEXT_LENGTH,
    "rms_norm_eps": Keys.Attention.LAYERNORM_RMS_EPS,
    "rope_theta": Keys.Rope.FREQ_BASE,
}
OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta")

# The `gguf` package's own table goes from Hugging Face's names to GGUF's only, and has those of all other families too.
OUTSIDE_THE_BLOCKS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_A_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPE_FACTORS = "rope_freqs.weight"  # not a weight: what Llama 3 divides each rotary frequency by


class GGUFCheckpoint:
    """The tensors and the configuration of a GGUF file of the llama, qwen2 or qwen3 architecture.

    Raises InputError, naming the file and the key or tensor, for anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(path)
        self.config = self._config()
        known = {gguf: hugging_face for hugging_face, gguf in gguf_names(self.config).items()}
        self._gguf_names = {known.get(name, name): name for name in self.file.tensors if name != ROPE_FACTORS}

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
        tensor, heads = self.file.read(self._gguf_names[name]), _heads_in_pairs(self.config, name)
        return tensor if heads is None else _transposed_heads(tensor, (heads, -1, 2))

    def _config(self) -> ModelConfig:
        metadata, tensors = self.file.metadata, self.file.tensors
        architecture = metadata.get(Keys.General.ARCHITECTURE)
        if metadata.get(Keys.General.TYPE) == "adapter":
            raise InputError(f"{self.path} is an adapter for llama.cpp, not a model: load_adapter reads PEFT folders")
        if architecture not in ARCHITECTURES.values():
            known = ", ".join(dict.fromkeys(ARCHITECTURES.values()))
            raise InputError(f"{self.path}: architecture {architecture!r} is not supported; supported are {known}")

        def value(key: str) -> Any:
            return metadata.get(key.format(arch=architecture))

        for name, key in KEYS.items():
            if name not in OPTIONAL and value(key) is None:
                raise InputError(f"{self.path}: the key {key.format(arch=architecture)} is missing")
        if (parts := metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT, 0)) > 1:
            raise InputError(f"{self.path} is one of {parts} parts: join them with llama.cpp's gguf-split --merge")
        if experts := value(Keys.LLM.EXPERT_COUNT):
            raise InputError(f"{self.path}: a mixture of {experts} experts is not supported")
        if "token_embd.weight" not in tensors:
            raise InputError(f"{self.path}: tensor token_embd.weight is missing")
        hf = {name: value(key) for name, key in KEYS.items()}
        hf["rope_theta"] = hf["rope_theta"] or 10000.0
        hf["head_dim"] = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
        if (rotated := value(Keys.Rope.DIMENSION_COUNT)) not in (None, hf["head_dim"]):
            raise InputError(
                f"{self.path}: rotary embeddings of only {rotated} of {hf['head_dim']} dimensions are not supported"
            )
        if value(Keys.Rope.SCALING_TYPE) not in (None, "none") and ROPE_FACTORS not in tensors:
            hf["rope_scaling"] = {
                "rope_type": value(Keys.Rope.SCALING_TYPE),
                "factor": value(Keys.Rope.SCALING_FACTOR),
            }
        hf |= {
            "model_type": architecture,
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
            "tie_word_embeddings": "output.weight" not in tensors,
            "bos_token_id": metadata.get(Keys.Tokenizer.BOS_ID),
            "eos_token_id": metadata.get(Keys.Tokenizer.EOS_ID),
            "pad_token_id": metadata.get(Keys.Tokenizer.PAD_ID),
        }
        config = ModelConfig.from_hf(hf, source=str(self.path))
        return self._with_llama3_scaling(config) if ROPE_FACTORS in tensors else config

    def _with_llama3_scaling(self, config: ModelConfig) -> ModelConfig:
        """The configuration whose RoPE scaling divides the frequencies by the factors stored in the file.

        The converter drops the four numbers that they came from; every Llama 3.1 to 3.3 has the same three of them and
        its largest factor is the fourth.
        """
        factors = self.file.read(ROPE_FACTORS)
        scaling = {
            "rope_type": "llama3",
            "factor": round(float(factors.max()), 4),  # a quotient of float32 numbers: 8.000001
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config = replace(config, rope_scaling=scaling)
        expected = rope_factors(config)
        # two float32 roundings each: 1e-5 is far above them and far below any other choice of the four numbers
        if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-5):
            raise InputError(f"{self.path}: tensor {ROPE_FACTORS} is not Llama 3's scaling, which alone is supported")
        return config


def rope_factors(config: ModelConfig) -> Tensor:
    """What the configuration's scaling divides each rotary frequency by."""
    return inverse_frequencies(replace(config, rope_scaling=None)) / inverse_frequencies(config)


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """GGUF's name of each tensor of the model: model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
    modules = dict(OUTSIDE_THE_BLOCKS)
    for i in range(config.num_hidden_layers):
        modules |= {f"model.layers.{i}.{name}": f"blk.{i}.{gguf}" for name, gguf in IN_A_BLOCK.items()}
    return {f"{name}.{kind}": f"{gguf}.{kind}" for name, gguf in modules.items() for kind in ("weight", "bias")}


def in_gguf_order(config: ModelConfig, name: str, rows: Tensor) -> Tensor:
    """A weight, a bias or a LoRA's B with its rows in the file's order: a head's as 0, D/2, 1, D/2 + 1, ..."""
    heads = _heads_in_pairs(config, name)
    return rows if heads is None else _transposed_heads(rows, (heads, 2, -1))


def _heads_in_pairs(config: ModelConfig, name: str) -> int | None:
    """The number of heads in a tensor whose rows the architecture "llama" has in pairs, which are q's and k's."""
    if ARCHITECTURES[config.model_type] != "llama":
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.split(".")[-2])


def _transposed_heads(w: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Each head's rows, seen as a matrix of two rows or two columns, transposed."""
    return w.view(*shape, *w.shape[1:]).transpose(1, 2).reshape(w.shape)
