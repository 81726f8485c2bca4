"""An adapter's scaling multiplied: PEFT's set_scale, in what is computed and in what is saved."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import FLOAT32, logits, tiny_llama
from helpers.peft import shake
from peft.tuners.lora import LoraLayer
from torch import nn

import minilora as ml
from minilora.adapters.attach import adapters_named

ALL = ["q_proj", "up_proj"]
LORA: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ALL, "lora_alpha": 12},
    "rsLoRA": {"target_modules": ALL, "use_rslora": True},
    "DoRA": {"target_modules": ALL, "use_dora": True},
    "patterns": {"target_modules": ALL, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
    "lora_bias": {"target_modules": ALL, "lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
}


def ours_on(base: nn.Module, config: Any, name: str = "default", seed: int = 1) -> Any:
    ml.add_adapter(base, config, name)
    shake(base, name, seed)
    return base.eval()


@pytest.mark.filterwarnings("ignore:.*(ensure_weight_tying|save_embedding_layers|tie_word_embeddings|tied)")
@pytest.mark.parametrize("case", LORA)
def test_it_is_what_peft_computes_and_what_is_saved(case: str, tmp_path: Path) -> None:
    base = tiny_llama(tied=case == "tied")
    model = ours_on(copy.deepcopy(base), ml.LoRAConfig(r=4, **LORA[case]))
    before = logits(model)
    ml.save_adapter(model, tmp_path / "before")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "before").eval()
    for layer in theirs.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", 0.4)
    ml.scale_adapter(model, 0.4)
    torch.testing.assert_close(logits(model), logits(theirs), **FLOAT32)
    assert not torch.allclose(logits(model), before)
    ml.save_adapter(model, tmp_path / "after")
    for loaded in (
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "after").eval(),
        ours_on_folder(copy.deepcopy(base), tmp_path / "after"),
    ):
        torch.testing.assert_close(logits(loaded), logits(model), **FLOAT32)
    swapped = ours_on(copy.deepcopy(base), ml.LoRAConfig(r=4, **LORA[case]), seed=2)
    ml.swap_adapter(swapped, tmp_path / "after")
    torch.testing.assert_close(logits(swapped), logits(model), **FLOAT32)
    ml.scale_adapter(model, 1 / 0.4)
    torch.testing.assert_close(logits(model), before, **FLOAT32)
    ml.unload(model, merge=True)
    torch.testing.assert_close(logits(model), before, **FLOAT32)


def ours_on_folder(base: nn.Module, folder: Path) -> nn.Module:
    ml.load_adapter(base, folder)
    return base.eval()


OTHERS = {
    "AdaLoRA": ml.AdaLoRAConfig(target_modules=ALL, init_r=4, target_r=2, tinit=1, tfinal=1, total_step=6),
    "LoHa": ml.LoHaConfig(target_modules=ALL, r=2, alpha_pattern={"q_proj": 3}),
    "LoKr": ml.LoKrConfig(target_modules=ALL, r=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_updates_with_a_scaling(name: str, tmp_path: Path) -> None:
    base = tiny_llama()
    model = ours_on(copy.deepcopy(base), OTHERS[name])
    deltas = {path: adapter.delta() for path, adapter in adapters_named(model, "default").items()}
    ml.scale_adapter(model, 0.5)
    for path, adapter in adapters_named(model, "default").items():
        torch.testing.assert_close(adapter.delta(), 0.5 * deltas[path])
    ml.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(ours_on_folder(copy.deepcopy(base), tmp_path)), logits(model), **FLOAT32)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), **FLOAT32)


def test_experts_that_are_one_tensor() -> None:
    model = nn.ModuleDict({"experts": nn.Module()})
    model["experts"].register_parameter("w", nn.Parameter(torch.randn(3, 4, 4)))
    ml.add_adapter(model, ml.LoRAConfig(target_parameters=["experts.w"], init_lora_weights=False))
    before = adapters_named(model, "default")["experts"].updates()["w"]
    ml.scale_adapter(model, 0.5)
    torch.testing.assert_close(adapters_named(model, "default")["experts"].updates()["w"], 0.5 * before)


def test_rows_of_a_mixed_batch_and_compiled_models_take_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    for name in ("a", "b"):
        ml.add_adapter(model, ml.LoRAConfig(target_modules=["0"], init_lora_weights=False), name)
    x, compiled = torch.randn(3, 4), torch.compile(model, backend="eager")
    ml.set_adapter(model, "a")
    base, a = model[0].base_layer(x), compiled(x)  # type: ignore[operator]
    ml.scale_adapter(model, 0.25, "a")
    torch.testing.assert_close(compiled(x), base + 0.25 * (a - base))
    with ml.adapters_for_rows(model, ["a", "b", "__base__"]):
        rows = model(x)
    torch.testing.assert_close(rows[0], (base + 0.25 * (a - base))[0])
    torch.testing.assert_close(rows[2], base[2])


REFUSED: list[tuple[Any, str]] = [
    (ml.LoRAConfig(target_modules=ALL, modules_to_save=["lm_head"]), "a TrainedCopy on lm_head"),
    (ml.LoRAConfig(target_modules=ALL, trainable_token_indices=[3]), "a TrainedRows on model.embed_tokens"),
    (ml.LoRAConfig(target_modules=ALL, init_lora_weights="pissa"), "starts from the base's own weights.*as_lora=True"),
    (ml.LoRAConfig(target_modules=ALL, lora_alpha=0), "lora_alpha=0: there is nothing to multiply"),
    (ml.VeRAConfig(target_modules=["q_proj"]), "a VeRA on"),
    (ml.IA3Config(target_modules=ALL, feedforward_modules=[]), "a IA3 on"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_has_more_than_a_scaled_update_is_refused(config: Any, message: str) -> None:
    model = ours_on(tiny_llama(), config)
    before = logits(model)
    with pytest.raises(ml.InputError, match=message):
        ml.scale_adapter(model, 0.5)
    assert torch.equal(logits(model), before)


def test_biases_merged_models_and_factors_that_are_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["0"], bias="lora_only"), "biased")
    with pytest.raises(ml.InputError, match="'biased' has more than a scaled update: a LoRA on 0"):
        ml.scale_adapter(model, 0.5, "biased")
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["0"]))
    for factor in (0, -1, float("nan"), float("inf"), True, "2"):
        with pytest.raises(ml.InputError, match="a number above 0, not by"):
            ml.scale_adapter(model, factor)  # type: ignore[arg-type]
    ml.merge(model)
    with pytest.raises(ml.InputError, match="merged"):
        ml.scale_adapter(model, 0.5)
