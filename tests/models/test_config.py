"""config.json both ways: transformers' own configurations in, ours out and into transformers again."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.models import CONFIGS, LINEAR, LLAMA3, SHAPE
from transformers import AutoConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from minilora.errors import InputError
from minilora.models.config import ModelConfig

LLAMA = {"model_type": "llama", **SHAPE}


@pytest.mark.parametrize("name", CONFIGS)
def test_to_hf_is_read_by_transformers_as_the_same_model(name: str, tmp_path: Path) -> None:
    config = ModelConfig.from_hf(CONFIGS[name].to_dict())
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is type(CONFIGS[name])
    assert ModelConfig.from_hf(read.to_dict()) == config
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("cls", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_what_config_json_leaves_out_means_what_it_means_to_transformers(cls: type[PreTrainedConfig]) -> None:
    sizes = {key: SHAPE[key] for key in SHAPE if key != "num_key_value_heads"} | {"num_attention_heads": 32}
    short = ModelConfig.from_hf({"model_type": cls.model_type, **sizes})
    full = ModelConfig.from_hf(cls(**sizes).to_dict())
    given = ("bos_token_id", "eos_token_ids")  # transformers fills in ids of Llama's own tokenizer
    assert {k: v for k, v in vars(short).items() if k not in given} == {
        k: v for k, v in vars(full).items() if k not in given
    }


@pytest.mark.parametrize("scaling", [None, LLAMA3, LINEAR])
def test_old_and_new_ways_to_write_rope_are_the_same(scaling: dict[str, Any] | None) -> None:
    old = ModelConfig.from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    new = ModelConfig.from_hf(
        {**LLAMA, "rope_parameters": {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}}
    )
    assert old == new
    assert old.rope_scaling == scaling
    if scaling == LINEAR:  # the key's first name
        oldest = {"type": "linear", "factor": 4.0}
        assert ModelConfig.from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": oldest}) == old


@pytest.mark.parametrize("first", [0, 1, 3, 28])
def test_qwens_earlier_way_to_name_the_layers_with_a_window(first: int) -> None:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": first}
    expected = ModelConfig.from_hf(Qwen2Config(**SHAPE, **window).to_dict())  # transformers writes layer_types out
    assert ModelConfig.from_hf({"model_type": "qwen2", **SHAPE, **window}).sliding_windows == expected.sliding_windows


def test_several_end_tokens() -> None:
    config = ModelConfig.from_hf({**LLAMA, "eos_token_id": [2, 7]})
    assert config.eos_token_ids == (2, 7)
    assert config.to_hf()["eos_token_id"] == [2, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported is 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "RoPE type 'yarn' is not supported; supported are"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a positive number, not None"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor must be a positive number, not None",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters of this form are not supported",
        ),
        ({"rope_theta": "large"}, "rope_theta must be a positive number, not 'large'"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number, not None"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, not '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": "two"}, "num_key_value_heads must be a positive integer, not 'two'"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token's number or a list of them, not '</s>'"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window must be a positive integer, not -1"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types must name full_attention or sliding_attention for each of 3 layers",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["linear_attention"] * 3},
            "layer_types must name full_attention or sliding_attention",
        ),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        ModelConfig.from_hf({**LLAMA, **change}, source="here/config.json")
    assert str(error.value).startswith("here/config.json: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
