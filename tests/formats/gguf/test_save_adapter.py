"""A LoRA alone as GGUF: llama.cpp with the base file and this one computes what the adapted model does here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat import CHATML, tiny
from helpers.gguf_models import FLOAT32, IDS, MODELS, adapted, model_of
from helpers.llama_cpp import LlamaCpp, largest_difference
from helpers.models import CONFIGS, transformers_model
from torch import nn

from minilora import (
    IA3Config,
    InputError,
    LoRAConfig,
    add_adapter,
    disable_adapters,
    load,
    save_adapter_gguf,
    save_gguf,
)
from minilora.formats.gguf.file import GGUFFile
from minilora.models.transformer import Transformer

# Beside the base in the file, where its effect is seen: B of q and k in the order of the file, one scale for all.
LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3, "down_proj": 1}},
    "pissa": {"init_lora_weights": "pissa"},
    "alpha 0": {"lora_alpha": 0, "alpha_pattern": {"k_proj": 3}},
    "head": {"target_modules": ["lm_head", "q_proj"]},
}


def difference(model: Transformer, folder: Path) -> float:
    with disable_adapters(model):
        save_gguf(model, tiny(CHATML), folder / "base.gguf", outtype="f32")
    save_adapter_gguf(model, folder / "lora.gguf")
    return largest_difference(LlamaCpp(folder / "base.gguf", folder / "lora.gguf"), model, IDS)


@pytest.mark.parametrize("name", ["llama", "llama-bias", "smollm", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_applies_it_to_every_architecture(name: str, tmp_path: Path) -> None:
    model = adapted(MODELS[name])
    assert difference(model, tmp_path) < FLOAT32
    with disable_adapters(model):  # the adapter matters
        base = LlamaCpp(tmp_path / "base.gguf")
        assert largest_difference(base, model, IDS) < FLOAT32
    assert largest_difference(base, model, IDS) > 1000 * FLOAT32


@pytest.mark.parametrize("name", LORAS)
def test_llama_cpp_applies_every_scaling_and_start(name: str, tmp_path: Path) -> None:
    assert difference(adapted(MODELS["llama"], **LORAS[name]), tmp_path) < FLOAT32


def test_of_a_qlora_the_base_is_what_nf4_dequantizes_to(tmp_path: Path) -> None:
    assert difference(adapted(MODELS["smollm"], nf4=True), tmp_path) < FLOAT32


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    save_adapter_gguf(adapted(MODELS["llama"]), tmp_path / "lora.gguf")
    file = GGUFFile(tmp_path / "lora.gguf")
    expected = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    assert expected.items() <= file.metadata.items()
    assert file.tensors["blk.2.ffn_down.weight.lora_a"].shape == (4, 112)
    assert file.tensors["blk.2.ffn_down.weight.lora_b"].shape == (64, 4)
    with pytest.raises(InputError, match=r"lora\.gguf is an adapter for llama\.cpp, not a model"):
        load(tmp_path / "lora.gguf")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(use_dora=True, target_modules=["q_proj"]), "q_proj has DoRA on it"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "k_proj has IA3 on it"),
        (LoRAConfig(bias="lora_only", target_modules=["q_proj"]), "q_proj has a bias of the adapter's own"),
        (LoRAConfig(bias="all", target_modules=["o_proj"]), "has OwnBias on it"),
        (LoRAConfig(target_modules=["embed_tokens"]), "embed_tokens is an embedding"),
        (LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "lm_head has TrainedCopy on it"),
        (LoRAConfig(target_modules=["q_proj"], trainable_token_indices=[3]), "embed_tokens has TrainedRows on it"),
    ],
)
def test_what_the_format_cannot_hold_is_named(config: Any, message: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS["qwen2"])
    add_adapter(model, config)
    with pytest.raises(InputError) as error:
        save_adapter_gguf(model, tmp_path / "lora.gguf")
    assert message in str(error.value) and "save_gguf" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_tied_head_nan_and_other_models_are_refused(tmp_path: Path) -> None:
    model = model_of(CONFIGS["smollm"])
    add_adapter(model, LoRAConfig(target_modules=["lm_head"]))
    with pytest.raises(InputError, match="lm_head is an embedding, or tied to one"):
        save_adapter_gguf(model, tmp_path / "lora.gguf")
    model = adapted(CONFIGS["llama"])
    nn.init.constant_(model.get_parameter("model.layers.1.mlp.up_proj.adapters.default.lora_B"), torch.inf)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: the LoRA holds NaN or infinity"):
        save_adapter_gguf(model, tmp_path / "lora.gguf")
    with pytest.raises(InputError, match="is not minilora's own model"):
        save_adapter_gguf(transformers_model(CONFIGS["llama"]), tmp_path / "lora.gguf")
    assert not list(tmp_path.iterdir())
