"""Adapters on tiny random models of many architectures: PEFT's targets, logits, gradients, folders, merged weights."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import SHAPE, logits, tiny_llama
from helpers.peft import FLOAT32, assert_same_logits_and_gradients, check_both_ways, ours_on, peft_on, shake, tiny_gpt2
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from minilora.adapters import merge
from minilora.adapters.attach import add_adapter, disable_adapters
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.merge import unload, unmerge
from minilora.adapters.targets import find_targets
from minilora.errors import InputError
from minilora.formats.peft import load_adapter, save_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(tie_word_embeddings|save_embedding_layers|fan_in_fan_out|ensure_weight_tying|missing keys|config file)"
)

COMMON = {**SHAPE, "initializer_range": 0.2, "attn_implementation": "eager", "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def seeded(model: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    torch.manual_seed(0)
    return model(config).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "gemma": lambda: seeded(GemmaForCausalLM, GemmaConfig(**COMMON, head_dim=8)),
    "gemma3": lambda: seeded(Gemma3ForCausalLM, Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=4)),
    "phi3": lambda: seeded(Phi3ForCausalLM, Phi3Config(**COMMON)),
    "mixtral": lambda: seeded(MixtralForCausalLM, MixtralConfig(**COMMON, num_local_experts=4)),
    "qwen2 moe": lambda: seeded(
        Qwen2MoeForCausalLM, Qwen2MoeConfig(**COMMON, **EXPERTS, shared_expert_intermediate_size=16)
    ),
    "gpt oss": lambda: seeded(
        GptOssForCausalLM, GptOssConfig(**COMMON, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3 moe": lambda: seeded(Qwen3MoeForCausalLM, Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=8)),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERT_PARAMETERS = ["gate_up_proj", "down_proj", "gate.weight"]
FUSED_EXPERTS = ("mixtral", "qwen3 moe")  # of which "all-linear" in PEFT also means the parameters of the experts
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"target_modules": "all-linear"}) for name in MODELS if name not in FUSED_EXPERTS),
    *((name, {"target_modules": ATTENTION}) for name in FUSED_EXPERTS),
    *(
        (name, {"target_modules": ATTENTION, "target_parameters": EXPERT_PARAMETERS, "rank_pattern": {"down_proj": 2}})
        for name in FUSED_EXPERTS
    ),
    ("gpt oss", {"target_modules": [], "target_parameters": ["experts.down_proj"], "modules_to_save": ["norm"]}),
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}),
    ("qwen2 moe", {"target_modules": ["shared_expert_gate", "down_proj"], "modules_to_save": ["mlp.gate"]}),
    ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"], "bias": "lora_only"}),
    *((name, {"target_modules": ["embed_tokens", "q_proj"]}) for name in ("gemma", "gemma3")),
    *((name, {"target_modules": ["lm_head"], "ensure_weight_tying": True}) for name in ("gemma", "gemma3")),
    *((name, {"target_modules": ["v_proj"], "trainable_token_indices": [5, 0]}) for name in ("gemma", "gemma3")),
    *((name, {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}) for name in ("gemma", "gemma3")),
]
NAMES = [f"{name}-{','.join(map(str, config.values()))}" for name, config in CASES]


@pytest.mark.parametrize(("name", "config"), CASES, ids=NAMES)
def test_adapted_as_peft_adapts_it(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    base = MODELS[name]()
    ours, theirs = ours_on(copy.deepcopy(base), config), peft_on(base, config)
    layers = theirs.get_base_model().named_modules()
    targeted = [path for path, module in layers if hasattr(module, "lora_A") and not isinstance(module, ParamWrapper)]
    assert find_targets(base, LoRAConfig(**config)) == targeted
    shake(ours)
    assert_same_logits_and_gradients(ours, theirs)
    tuned = logits(ours)

    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()), tuned, **FLOAT32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again), tuned, **FLOAT32)

    merge(ours)
    torch.testing.assert_close(logits(ours), tuned, **FLOAT32)
    with disable_adapters(ours):
        assert torch.equal(logits(ours), logits(base))
    unmerge(ours)
    assert torch.equal(logits(ours), tuned)
    torch.testing.assert_close(logits(unload(ours, merge=True)), tuned, **FLOAT32)


@pytest.mark.parametrize("name", FUSED_EXPERTS)
def test_experts_that_are_parameters_are_no_layers(name: str) -> None:
    model = MODELS[name]()
    every_linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert find_targets(model, LoRAConfig(target_modules="all-linear")) == [p for p in every_linear if p != "lm_head"]
    for target, message in (
        (
            "down_proj",
            r"'down_proj' matches no layer; it is a parameter of model\.layers\.0\.mlp\.experts.*target_param",
        ),
        ("experts", r"matches model\.layers\.0\.mlp\.experts, a \w+Experts: only linear layers"),
    ):
        with pytest.raises(InputError, match=message):
            add_adapter(model, LoRAConfig(target_modules=[target, "q_proj"]))


@pytest.mark.parametrize("name", FUSED_EXPERTS)
def test_all_linear_of_peft_with_its_experts_is_read(name: str, tmp_path: Path) -> None:
    base = MODELS[name]()
    theirs = peft_on(base, {"target_modules": "all-linear", "init_lora_weights": False})
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), **FLOAT32)
    assert not torch.allclose(logits(ours), logits(base), **FLOAT32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_parameters": ["down_porj"]}, r"'down_porj' matches no parameter; .*'down_proj'"),
        ({"target_parameters": ["q_proj.weight"]}, "name it in target_modules"),
        ({"target_parameters": ["norm.weight"]}, r"model\.norm\.weight of shape \(32,\), which is not 2D or 3D"),
        ({"target_parameters": ["down_proj"], "use_dora": True}, "takes no lora_dropout, no use_dora"),
    ],
)
def test_parameters_that_cannot_be_targeted(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_adapter(MODELS["mixtral"](), LoRAConfig(**{"target_modules": ["q_proj"]} | config))


def test_a_classifier_has_its_new_head_saved_as_in_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**COMMON, num_labels=3)).eval()
    config = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    ours = ours_on(copy.deepcopy(base), config)
    shake(ours)
    check_both_ways(ours, base, tmp_path)
    assert "score" not in find_targets(base, LoRAConfig(**config))


def test_a_plain_sequential_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 5))
    config = {"target_modules": ["0", "1"], "bias": "all", "modules_to_save": ["4"], "task_type": None}
    ours = copy.deepcopy(base)
    add_adapter(ours, LoRAConfig(r=4, **config))
    shake(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), **FLOAT32)
    torch.testing.assert_close(logits(unload(copy.deepcopy(ours), merge=True)), logits(ours), **FLOAT32)
    assert torch.equal(logits(unload(ours)), logits(base))


def test_a_model_of_sounds_which_has_no_embedding_of_tokens() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [2, 2]}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(**sizes, **convolutions, **positions, mask_time_prob=0.0, layerdrop=0.0)
    model = Wav2Vec2Model(config).eval()
    sound = torch.randn(1, 200)
    base = model(sound).last_hidden_state
    ours_on(model, {"target_modules": ["q_proj"], "bias": "all"})
    shake(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model(sound).last_hidden_state.square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model).values())
    assert torch.equal(unload(model).eval()(sound).last_hidden_state, base)
