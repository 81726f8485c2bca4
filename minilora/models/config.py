"""ModelConfig: the shape of a decoder-only Transformer of the Llama family, read from Hugging Face's config.json.

Llama (SmolLM is one), Mistral, Qwen2 and Qwen3 differ in five things only: biases, RMSNorm on queries and keys, the
sliding window, the scaling of the rotary frequencies, and the defaults of a config.json.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minilora.errors import InputError

# Of each architecture the defaults in transformers, for keys that a config.json leaves out.
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}

ROPE_SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# Settings that are not implemented: only the values that mean "off" are accepted.
OFF: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only Transformer, in Hugging Face's own names where it has them.

    `sliding_windows` holds for each layer the number of positions a token sees, itself included, or None for all.
    `rope_scaling` is None, or a dict of `rope_type` ("linear" or "llama3") and that type's numbers.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    sliding_windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Read the content of a config.json, of the old style (rope_theta, rope_scaling) or the new (rope_parameters).

        Raises InputError, naming `source` and the key, for an architecture or a setting that has no code here.
        """
        kind = hf.get("model_type")
        if kind not in DEFAULTS:
            raise InputError(f"{source}: model_type {kind!r} is not supported; supported are {', '.join(DEFAULTS)}")
        fields = _Fields({"rms_norm_eps": 1e-6, "rope_theta": 10000.0, **DEFAULTS[kind], **hf}, source)
        for key, allowed in OFF.items():
            if hf.get(key, allowed[0]) not in allowed:
                raise fields.error(f"{key} {hf[key]!r} is not supported; supported is {allowed[0]!r}")

        heads = fields.integer("num_attention_heads")
        kv_heads = fields.optional_integer("num_key_value_heads") or heads
        if heads % kv_heads:
            raise fields.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        head_dim = fields.optional_integer("head_dim") or fields.integer("hidden_size") // heads
        if head_dim % 2:
            raise fields.error(f"head_dim {head_dim} is odd, but rotary embeddings turn pairs")
        rope_theta, rope_scaling = _rope(fields)
        names = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"
        sizes: dict[str, Any] = {name: fields.integer(name) for name in names}
        bias = bool(hf.get("attention_bias", False)) and kind in ("llama", "qwen3")
        return cls(
            model_type=kind,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(fields.number("rms_norm_eps")),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            sliding_windows=_sliding_windows(fields),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=bias or kind == "qwen2",  # Qwen2 has it by definition, and on q, k and v only
            o_bias=bias,
            mlp_bias=bool(hf.get("mlp_bias", False)) and kind == "llama",
            qk_norm=kind == "qwen3",
            bos_token_id=hf.get("bos_token_id"),
            eos_token_ids=fields.token_ids("eos_token_id"),
            pad_token_id=hf.get("pad_token_id"),
            **sizes,
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json, in the old style, which every version of transformers reads."""
        ends = list(self.eos_token_ids)
        not_hf = ("sliding_windows", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "eos_token_ids")
        hf = {name: value for name, value in vars(self).items() if name not in not_hf}
        hf |= {"architectures": [f"{self.model_type.capitalize()}ForCausalLM"], "hidden_act": "silu"}
        hf["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
        window = next((size for size in self.sliding_windows if size is not None), None)
        if self.model_type in ("llama", "qwen3"):
            hf["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            hf["mlp_bias"] = self.mlp_bias
        else:
            hf["sliding_window"] = window
        if self.model_type in ("qwen2", "qwen3"):
            hf["use_sliding_window"] = window is not None
            hf["layer_types"] = ["sliding_attention" if size else "full_attention" for size in self.sliding_windows]
        return hf


class _Fields:
    """The values of a config.json, checked as they are taken; every complaint names the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def error(self, message: str) -> InputError:
        return InputError(f"{self.source}: {message}")

    def integer(self, key: str) -> int:
        value = self.values.get(key)
        if type(value) is not int or value < 1:
            raise self.error(f"{key} must be a positive integer, not {value!r}")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.integer(key)

    def number(self, key: str) -> int | float:
        value = self.values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(f"{key} must be a positive number, not {value!r}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in ids):
            raise self.error(f"{key} must be a token's number or a list of them, not {value!r}")
        return tuple(ids)


def _rope(fields: _Fields) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling, wherever this version of transformers wrote them."""
    values = fields.values
    written = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(written, dict) or any(isinstance(value, dict) for value in written.values()):
        raise fields.error(f"rope_parameters of this form are not supported: {written!r}")
    rope = _Fields({"rope_theta": values["rope_theta"], **written}, fields.source)
    if rope.values.get("partial_rotary_factor") not in OFF["partial_rotary_factor"]:
        raise rope.error(f"partial_rotary_factor {rope.values['partial_rotary_factor']!r} is not supported")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ROPE_SCALING_KEYS:
        raise rope.error(f"RoPE type {kind!r} is not supported; supported are {', '.join(ROPE_SCALING_KEYS)}")
    if kind == "llama3":
        default = {"original_max_position_embeddings": fields.integer("max_position_embeddings")}
        rope.values = {**default, **rope.values}
    scaling = {key: rope.number(key) for key in ROPE_SCALING_KEYS[kind]}
    return float(rope.number("rope_theta")), {"rope_type": kind, **scaling} if scaling else None


def _sliding_windows(fields: _Fields) -> tuple[int | None, ...]:
    """The sliding window of each layer, or None where a layer attends to everything before it."""
    values, layers = fields.values, fields.integer("num_hidden_layers")
    if values["model_type"] == "mistral":
        return (fields.optional_integer("sliding_window"),) * layers
    if values["model_type"] == "llama" or not values.get("use_sliding_window"):
        return (None,) * layers
    window = fields.integer("sliding_window")
    types = values.get("layer_types")
    if types is None:  # Qwen's earlier way: the layers from max_window_layers on
        first = values["max_window_layers"]
        types = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0)
    if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise fields.error(
            f"layer_types must name full_attention or sliding_attention for each of {layers} layers, not {types!r}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
