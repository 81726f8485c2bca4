"""ensure_weight_tying over more than a pair: one tensor for embeddings of encoder and decoder and for the head."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import FLOAT32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BartConfig, BartForConditionalGeneration, BartModel, T5Config, T5ForConditionalGeneration

import minilora as ml
from minilora.adapters.attach import adapters_named

IDS = torch.tensor([[5, 6, 7, 8], [9, 5, 11, 0]])


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return T5ForConditionalGeneration(config).eval()


def bart(kind: Any = BartForConditionalGeneration) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32, "init_std": 0.2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return kind(BartConfig(vocab_size=64, scale_embedding=True, **sizes, **heads)).eval()


MODELS = {"t5": (t5, "shared", "q"), "bart": (bart, "model.shared", "q_proj")}
CASES: dict[str, dict[str, Any]] = {
    "by the head": {"target_modules": ["lm_head"]},
    "by an embedding": {"target_modules": ["encoder.embed_tokens"]},
    "by what holds the weight": {"target_modules": ["shared"]},
    "a copy": {"modules_to_save": ["lm_head"]},
    "a copy of what holds the weight": {"modules_to_save": ["shared"]},
}


def answer(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS).logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_what_trains_of_one_trains_of_all_as_one(name: str, case: str, tmp_path: Path) -> None:
    build, shared, elsewhere = MODELS[name]
    base, config = build(), CASES[case]
    model = copy.deepcopy(base)
    config = {"target_modules": [elsewhere], "ensure_weight_tying": True} | config
    ml.add_adapter(model, ml.LoRAConfig(**config))
    torch.testing.assert_close(answer(model), answer(base), **FLOAT32)
    owner: Any = adapters_named(model, "default")[shared]
    tensors = [owner.module.weight] if "copy" in case else [owner.lora_A, owner.lora_B]
    of_ties = [path for path in adapters_named(model, "default") if "embed_tokens" in path or path == "lm_head"]
    assert len(of_ties) == 3
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(0.1 * torch.randn_like(tensor))

    def by_hand() -> Tensor:
        weight = tensors[0] if "copy" in case else base.get_parameter(f"{shared}.weight") + owner.delta().T
        output: Any = functional_call(
            base, {f"{shared}.weight": weight}, (), {"input_ids": IDS, "decoder_input_ids": IDS}
        )
        return output.logits

    expected = by_hand()
    torch.testing.assert_close(answer(model), expected, **FLOAT32)
    expected.square().mean().backward()
    gradients = [tensor.grad for tensor in tensors]
    model.zero_grad()
    answer(model).square().mean().backward()
    for tensor, gradient in zip(tensors, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, **FLOAT32)
    y = answer(model)
    ml.save_adapter(model, tmp_path / "adapter")
    again = copy.deepcopy(base)
    ml.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(answer(again), y)
    assert list(ml.trainable_parameters(again)) == list(ml.trainable_parameters(model))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    if "copy" in case:  # PEFT puts its copy of the embedding in the place of the head too
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            answer(theirs)
    else:
        torch.testing.assert_close(answer(theirs), y, **FLOAT32)
    ml.unload(model, merge=True)
    torch.testing.assert_close(answer(model), y, **FLOAT32)
    weights = {id(model.get_submodule(path).weight) for path in [shared, *of_ties]}
    assert len(weights) == 1 and model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(type(model).from_pretrained(tmp_path / "merged").eval()), y, **FLOAT32)


def test_a_model_without_a_head_is_tied_too(tmp_path: Path) -> None:
    base = bart(BartModel)
    model = copy.deepcopy(base)
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))
    owner: Any = adapters_named(model, "default")["shared"]
    assert list(ml.trainable_parameters(model)) == [f"shared.adapters.default.lora_{factor}" for factor in "AB"]
    with torch.no_grad():
        for parameter in ml.trainable_parameters(model).values():
            parameter.normal_(std=0.3)
        base.shared.weight += owner.delta().T
    torch.testing.assert_close(model(input_ids=IDS)[0], base(input_ids=IDS)[0], **FLOAT32)
    ml.save_adapter(model, tmp_path)
    again = bart(BartModel)
    ml.load_adapter(again, tmp_path)
    assert torch.equal(again(input_ids=IDS)[0], model(input_ids=IDS)[0])


def test_a_file_in_which_what_is_one_differs_is_refused(tmp_path: Path) -> None:
    model = t5()
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["lm_head"], ensure_weight_tying=True))
    ml.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(ml.InputError, match="differs from what ensure_weight_tying makes one with it"):
        ml.load_adapter(t5(), tmp_path)
