"""GGUF files of tiny models, named and permuted as llama.cpp's converter does it, against the models themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gguf import gguf_metadata, gguf_tensors, logits, write_gguf, write_model
from helpers.models import CONFIGS, SHAPE, relative_error, transformers_model
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minilora.errors import InputError
from minilora.formats.gguf.weights import GGUFCheckpoint
from minilora.formats.load import assemble

IDS = torch.arange(26).view(2, 13) * 5 % 97
FLOAT32 = 1e-5  # see models/test_transformer.py


def load_float32(path: Path) -> torch.nn.Module:
    return assemble(GGUFCheckpoint(path), False, True, 64, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama", "llama-bias", "smollm", "mistral", "qwen2", "qwen3"])
def test_logits_equal_the_model_that_was_written(name: str, tmp_path: Path) -> None:
    model = transformers_model(CONFIGS[name])
    ours = load_float32(write_model(tmp_path / "model.gguf", model))
    assert relative_error(logits(ours, IDS), logits(model, IDS)) < FLOAT32


def test_linear_rope_scaling(tmp_path: Path) -> None:
    model = transformers_model(CONFIGS["linear-rope"])
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    ours = load_float32(write_model(tmp_path / "model.gguf", model, scaling))
    assert relative_error(logits(ours, IDS), logits(model, IDS)) < FLOAT32


@pytest.mark.parametrize("factor", [8.0, 32.0])  # Llama 3.1 and 3.3; Llama 3.2
def test_llama3_rope_scaling_is_found_from_its_factors(factor: float, tmp_path: Path) -> None:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192, **scaling}
    config = LlamaConfig(**SHAPE, head_dim=64, max_position_embeddings=131072, rope_parameters=rope)
    model = transformers_model(config)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 5e5 ** (-torch.arange(0, 64, 2) / 64)
    factors = (plain / frequencies).numpy().astype(np.float32)
    path = write_model(tmp_path / "model.gguf", model, **{"rope_freqs.weight": factors})

    assert GGUFCheckpoint(path).config.rope_scaling == {k: v for k, v in rope.items() if k != "rope_theta"}
    assert relative_error(logits(load_float32(path), IDS), logits(model, IDS)) < FLOAT32

    path = write_model(tmp_path / "model.gguf", model, **{"rope_freqs.weight": np.sqrt(factors)})
    with pytest.raises(InputError, match=r"rope_freqs\.weight is not Llama 3's scaling"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_count": 8}, "a mixture of 8 experts is not supported"),
        ({"rope.scaling.type": "yarn"}, "RoPE type 'yarn' is not supported"),
        ({"rope.dimension_count": 8}, "rotary embeddings of only 8 of 16 dimensions are not supported"),
        ({"block_count": None}, "the key llama.block_count is missing"),
        ({"block_count": 4}, "tensor model.layers.3.input_layernorm.weight is missing"),
        ({"feed_forward_length": 100}, r"tensor blk.0.ffn_gate.weight has shape (112, 64)"),
        ({":split.count": 3}, "is one of 3 parts"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", transformers_model(CONFIGS["llama"]), change)
    with pytest.raises(InputError) as error:
        load_float32(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_another_architecture_and_another_tensor_are_named(tmp_path: Path) -> None:
    model = transformers_model(CONFIGS["llama"])
    path = write_gguf(tmp_path / "phi.gguf", "phi3", gguf_metadata(model), gguf_tensors(model))
    with pytest.raises(InputError, match="architecture 'phi3' is not supported; supported are llama, qwen2, qwen3"):
        GGUFCheckpoint(path)
    extra = {"blk.0.attn_sub_norm.weight": np.ones(64, np.float32)}
    with pytest.raises(InputError, match=r"tensor blk\.0\.attn_sub_norm\.weight has no place in a llama model"):
        load_float32(write_model(tmp_path / "extra.gguf", model, **extra))
