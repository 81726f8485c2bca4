"""Folders of models whose embedding was resized for new tokens: PEFT's here, and ours in PEFT."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import FLOAT32, tiny_llama
from helpers.peft import shake
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import minilora as ml

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers|missing keys|is_gradient)")

IDS = torch.tensor([[1, 64, 65, 3, 67], [66, 2, 5, 67, 64]])
NEW = [64, 65, 66, 67]
CONFIGS: dict[str, dict[str, Any]] = {
    "LoRA elsewhere": {"target_modules": ["q_proj"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": NEW},
    "rows of both": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}},
    "other rows of the head": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [64, 65], "lm_head": [64, 66]},
    },
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA on both": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "copies": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "a copy of the embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: Any, tmp_path: Path) -> Path:
    tiny_llama(tied=request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resized(base: Path, seed: int) -> Any:
    """The model on the disk with four new tokens, whose rows are drawn anew each time."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(68)
    return model


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("save_embedding_layers", ["auto", True])
@pytest.mark.parametrize("case", CONFIGS)
def test_peft_s_folder_is_read_as_peft_reads_it(
    base: Path, tmp_path: Path, case: str, save_embedding_layers: Any
) -> None:
    theirs = peft.get_peft_model(resized(base, seed=1), peft.LoraConfig(task_type="CAUSAL_LM", **CONFIGS[case])).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=save_embedding_layers)
    again = peft.PeftModel.from_pretrained(resized(base, seed=2), tmp_path / "adapter").eval()
    ours = resized(base, seed=2)  # PEFT leaves an untied one out where the other has LoRA
    ml.load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(answer(ours), answer(again), **FLOAT32)


def test_without_the_embeddings_in_the_file_rows_of_new_tokens_are_read_too(base: Path, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(resized(base, seed=1), peft.LoraConfig(task_type="CAUSAL_LM", **CONFIGS["rows"]))
    theirs.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = resized(base, seed=1)
    ml.load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(answer(ours), answer(theirs), **FLOAT32)


@pytest.mark.parametrize("case", CONFIGS)
def test_our_folder_holds_the_resized_embedding_for_peft_and_for_us(base: Path, tmp_path: Path, case: str) -> None:
    ours = resized(base, seed=1)
    ml.add_adapter(ours, ml.LoRAConfig(**CONFIGS[case]))
    shake(ours)
    ml.save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(resized(base, seed=2), tmp_path / "adapter").eval()
    torch.testing.assert_close(answer(theirs), answer(ours), **FLOAT32)
    again = resized(base, seed=3)
    ml.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(answer(again), answer(ours))
    with ml.disable_adapters(again), ml.disable_adapters(ours):
        assert torch.equal(answer(again), answer(ours))


def test_the_keys_are_pefts_and_a_tied_head_is_written_once(base: Path, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(resized(base, seed=1), peft.LoraConfig(task_type="CAUSAL_LM", **CONFIGS["rows"]))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = resized(base, seed=1)
    ml.add_adapter(ours, ml.LoRAConfig(**CONFIGS["rows"]))
    ml.save_adapter(ours, tmp_path / "ours")
    keys = [load_file(tmp_path / name / "adapter_model.safetensors").keys() for name in ("ours", "theirs")]
    tied = ours.config.tie_word_embeddings
    assert {key for key in keys[1] - keys[0] if "lm_head" in key} == keys[1] - keys[0]
    assert keys[0] <= keys[1] and (keys[0] == keys[1]) is not tied


def test_what_was_not_resized_is_not_written_unless_asked_for(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["q_proj", "embed_tokens"]))
    for save_embedding_layers, count in (("auto", 0), (False, 0), (True, 1 if model.config.tie_word_embeddings else 2)):
        ml.save_adapter(model, tmp_path / "a", save_embedding_layers=save_embedding_layers)
        tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert sum("lora" not in key for key in tensors) == count
    with pytest.raises(ml.InputError, match="save_embedding_layers='yes' is not True, False or 'auto'"):
        ml.save_adapter(model, tmp_path / "a", save_embedding_layers="yes")
    ml.merge(model)
    with pytest.raises(ml.InputError, match="merged"):
        ml.save_adapter(model, tmp_path / "a", save_embedding_layers=True)


def test_where_the_vocabulary_cannot_be_compared_it_is_said(base: Path, tmp_path: Path) -> None:
    model = resized(base, seed=1)
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["q_proj"], base_model_name_or_path="/nowhere/base"))
    with pytest.warns(UserWarning, match=r"cannot read the config\.json of /nowhere/base.*save_embedding_layers=True"):
        ml.save_adapter(model, tmp_path / "a")
    own = nn.Sequential(nn.Linear(4, 4))
    ml.add_adapter(own, ml.LoRAConfig(target_modules=["0"]))
    with pytest.raises(ml.InputError, match="does not tell which of its layers is the embedding"):
        ml.save_adapter(own, tmp_path / "a", save_embedding_layers=True)


def saved(base: Path, folder: Path, case: str = "LoRA elsewhere", **config: Any) -> Any:
    model = resized(base, seed=1)
    ml.add_adapter(model, ml.LoRAConfig(**CONFIGS[case] | config))
    shake(model)
    ml.save_adapter(model, folder)
    return model


def test_a_base_that_was_not_resized_is_told_how(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a")
    with pytest.raises(ml.InputError, match=r"has 68 rows, the model's 64: .*resize_token_embeddings\(68\)"):
        ml.load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a")


def test_a_base_in_a_wider_dtype_keeps_its_own_numbers(base: Path, tmp_path: Path) -> None:
    model = resized(base, seed=1).bfloat16()
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["q_proj"]))
    ml.save_adapter(model, tmp_path / "a")
    wide = resized(base, seed=2)
    own = wide.model.embed_tokens.weight.clone()
    ml.load_adapter(wide, tmp_path / "a")
    assert torch.equal(wide.model.embed_tokens.weight[:64], own[:64])
    assert torch.equal(wide.model.embed_tokens.weight[64:].bfloat16(), model.model.embed_tokens.weight[64:])


def test_only_what_is_of_tokens_is_given_other_rows(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors, model = load_file(file), resized(base, seed=1)
    other = model.model.layers[0].mlp.up_proj.weight.clone()
    other[-1] += 1
    for key, value, message in (
        ("model.layers.0.mlp.up_proj.weight", other, r"is not the model's model\.layers\.0\.mlp\.up_proj\.weight"),
        ("model.embed_tokens.weight", torch.randn(68, 32), r"is not the model's model\.embed_tokens\.weight"),
    ):
        save_file(tensors | {f"base_model.model.{key}": value}, file)
        with pytest.raises(ml.InputError, match=message):
            ml.load_adapter(model, tmp_path / "a")


def test_a_start_is_derived_from_the_rows_of_the_file(base: Path, tmp_path: Path) -> None:
    model = saved(base, tmp_path / "a", "LoRA on the head", init_lora_weights="pissa", r=4)
    again = resized(base, seed=2)
    ml.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(answer(again), answer(model), **FLOAT32)


def test_a_base_that_other_adapters_use_keeps_its_rows(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a")
    model = resized(base, seed=2)
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["q_proj"]), "first")
    before = answer(model)
    with pytest.raises(ml.InputError, match=r"other rows for the new tokens .*\['first'\] may use: unload"):
        ml.load_adapter(model, tmp_path / "a", "second")
    with pytest.raises(ml.InputError, match=r"other rows for the new tokens .* load it anew"):
        ml.swap_adapter(model, tmp_path / "a", "first")
    assert torch.equal(answer(model), before) and ml.adapter_names(model) == ["first"]


def test_what_fails_leaves_the_rows_as_they_were(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a")
    model = resized(base, seed=2)
    before = answer(model)
    with pytest.raises(ml.InputError, match="cannot name an adapter"):
        ml.load_adapter(model, tmp_path / "a", "a.b")
    assert torch.equal(answer(model), before)


def test_rows_of_t5_s_new_tokens_go_through_all_that_is_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")

    def model(seed: int) -> Any:
        loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        loaded.resize_token_embeddings(62)
        return loaded

    ids = torch.tensor([[1, 60, 61, 3]])
    values = {"target_modules": ["q"], "trainable_token_indices": [60], "task_type": "SEQ_2_SEQ_LM"}
    theirs = peft.get_peft_model(model(1), peft.LoraConfig(**values)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)) if parameter.requires_grad else None
    theirs.save_pretrained(tmp_path / "theirs")
    ours = model(2)
    ml.load_adapter(ours, tmp_path / "theirs")
    expected = theirs(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(ours(input_ids=ids, decoder_input_ids=ids).logits, expected, **FLOAT32)
    ml.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model(3), tmp_path / "ours").eval()
    torch.testing.assert_close(again(input_ids=ids, decoder_input_ids=ids).logits, expected, **FLOAT32)
