"""ModelConfig: what a decoder-only Transformer of the Llama family needs to know, read from Hugging Face's config.json.

Llama (SmolLM is one), Mistral, Qwen2 and Qwen3 differ in five places only: biases, RMSNorm on queries and keys,
the sliding window, the RoPE scaling and the defaults of what config.json leaves out. They are all in this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minilora.errors import InputError

# What config.json may leave out, and what it then means (transformers' own defaults for that architecture).
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
}
MAX_WINDOW_LAYERS = 28  # Qwen2's and Qwen3's default: the layers from this one on have the sliding window

ROPE_SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# Settings that would change the logits and that this model has no code for: only the value that means "off" is taken.
OFF: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only Transformer, in Hugging Face's own names where it has them.

    `sliding_windows` holds for each layer the number of positions a token sees, itself included, or None for all.
    `rope_scaling` is None or a dict with `rope_type` ("linear" or "llama3") and that type's numbers.
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
        model_type = hf.get("model_type")
        if model_type not in DEFAULTS:
            raise InputError(
                f"{source}: model_type {model_type!r} is not supported; supported are {', '.join(DEFAULTS)}"
            )
        for key, allowed in OFF.items():
            if hf.get(key, allowed[0]) not in allowed:
                raise InputError(f"{source}: {key} {hf[key]!r} is not supported; supported is {allowed[0]!r}")

        heads = _positive(hf, "num_attention_heads", source)
        hidden_size = _positive(hf, "hidden_size", source)
        defaults = {key: hf.get(key, default) for key, default in DEFAULTS[model_type].items()}
        kv_heads = defaults["num_key_value_heads"] or heads
        if heads % kv_heads:
            raise InputError(
                f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = defaults["head_dim"] or hidden_size // heads
        if head_dim % 2:
            raise InputError(f"{source}: head_dim {head_dim} is odd; rotary embeddings need pairs")

        layers = _positive(hf, "num_hidden_layers", source)
        rope_theta, rope_scaling = _rope(hf, defaults["max_position_embeddings"], source)
        attention_bias = bool(hf.get("attention_bias", False))
        eos = hf.get("eos_token_id")
        return cls(
            model_type=model_type,
            vocab_size=_positive(hf, "vocab_size", source),
            hidden_size=hidden_size,
            intermediate_size=_positive(hf, "intermediate_size", source),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=defaults["max_position_embeddings"],
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            sliding_windows=_sliding_windows(hf, model_type, defaults.get("sliding_window"), layers, source),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            # Qwen2 has its bias on q, k and v by definition; Llama's and Qwen3's attention_bias includes o
            qkv_bias=model_type == "qwen2" or (model_type in ("llama", "qwen3") and attention_bias),
            o_bias=model_type in ("llama", "qwen3") and attention_bias,
            mlp_bias=model_type == "llama" and bool(hf.get("mlp_bias", False)),
            qk_norm=model_type == "qwen3",
            bos_token_id=hf.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            pad_token_id=hf.get("pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """The same as the content of a config.json, in the old style, which every version of transformers reads."""
        hf: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
        }
        window = next((w for w in self.sliding_windows if w is not None), None)
        if self.model_type == "mistral":
            hf |= {"sliding_window": window}
        if self.model_type in ("llama", "qwen3"):
            hf |= {"attention_bias": self.qkv_bias}
        if self.model_type == "llama":
            hf |= {"mlp_bias": self.mlp_bias}
        if self.model_type in ("qwen2", "qwen3"):
            hf |= {
                "use_sliding_window": window is not None,
                "sliding_window": window,
                "layer_types": ["full_attention" if w is None else "sliding_attention" for w in self.sliding_windows],
            }
            first = next((i for i, w in enumerate(self.sliding_windows) if w is not None), len(self.sliding_windows))
            hf |= {"max_window_layers": first}
        return hf


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _positive(hf: Mapping[str, Any], key: str, source: str) -> int:
    value = hf.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{source}: {key} must be a positive integer, not {value!r}")
    return value


def _rope(hf: Mapping[str, Any], max_position_embeddings: int, source: str) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling, wherever this version of transformers wrote them."""
    parameters = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    rope_theta = float(parameters.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in ROPE_SCALING_KEYS:
        raise InputError(
            f"{source}: RoPE type {rope_type!r} is not supported; supported are {', '.join(ROPE_SCALING_KEYS)}"
        )
    if parameters.get("partial_rotary_factor") not in OFF["partial_rotary_factor"]:
        raise InputError(f"{source}: partial_rotary_factor {parameters['partial_rotary_factor']!r} is not supported")
    if rope_type == "default":
        return rope_theta, None
    if rope_type == "llama3":
        parameters.setdefault("original_max_position_embeddings", max_position_embeddings)
    for key in ROPE_SCALING_KEYS[rope_type]:
        if not isinstance(parameters.get(key), (int, float)) or parameters[key] <= 0:
            raise InputError(f"{source}: RoPE type {rope_type!r} needs a positive {key}, not {parameters.get(key)!r}")
    return rope_theta, {
        "rope_type": rope_type,
        **{key: parameters[key] for key in ROPE_SCALING_KEYS[rope_type]},
    }


def _sliding_windows(
    hf: Mapping[str, Any], model_type: str, window: int | None, layers: int, source: str
) -> tuple[int | None, ...]:
    """The sliding window of each layer, or None where a layer attends to everything before it."""
    if model_type == "mistral":
        return (window,) * layers
    if model_type == "llama" or not hf.get("use_sliding_window", False):
        return (None,) * layers
    types = hf.get("layer_types")
    if types is None:
        first = hf.get("max_window_layers", MAX_WINDOW_LAYERS)
        return tuple(window if i >= first else None for i in range(layers))
    if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise InputError(
            f"{source}: layer_types must name full_attention or sliding_attention for each of {layers} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
