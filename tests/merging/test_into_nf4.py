"""Merging into 4 bits on whole models: less is lost than by requantizing, the model is whole before and after."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import SHAPE, logits, tiny_llama
from helpers.chat import CHATML, tiny
from helpers.models import CONFIGS, our_model, relative_error, transformers_model
from helpers.models import SHAPE as MODEL_SHAPE
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minilora.adapters.attach import adapter_names, add_adapter, set_adapter
from minilora.adapters.layer import AdaptedLayer
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.merge import merge, unload, unmerge
from minilora.adapters.targets import adapted_layers
from minilora.errors import InputError
from minilora.formats.load import load
from minilora.formats.peft import save_adapter
from minilora.formats.save_pretrained import save_pretrained
from minilora.merging.into_nf4 import merge_to_lora, merge_to_nf4
from minilora.models.transformer import Transformer
from minilora.nf4.codec import quantize
from minilora.nf4.linear import NF4Linear
from minilora.variants.calibration.input_moments import input_moments
from minilora.variants.ia3 import IA3Config

TOKENS = torch.arange(26).view(2, 13) * 5 % 97  # for minilora's own model


def our_logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def in_nf4(model: nn.Module) -> nn.Module:
    """The model with the linear layers of its blocks in NF4."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            model.set_submodule(path, NF4Linear.from_linear(module, name=path))
    return model


def tuned(nf4: bool = True, targets: Any = "all-linear", std: float = 0.02, **config: Any) -> LlamaForCausalLM:
    """A tiny Llama with an adapter whose change is a few percent of its weights."""
    model = tiny_llama()
    model = in_nf4(model) if nf4 else model
    add_adapter(model, LoRAConfig(r=4, lora_alpha=4, target_modules=targets, **config))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=std**0.5)
    return model


def batches(seed: int = 0, n: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(SHAPE["vocab_size"], (4, 32), generator=generator) for _ in range(n)]


def far_from(model: nn.Module, wanted: list[Tensor]) -> float:
    """Mean squared distance of the logits from the wanted ones, on batches that no merge has seen."""
    with torch.no_grad():
        found = [model(batch).logits for batch in batches(seed=1)]
    return sum((a - b).square().mean().item() for a, b in zip(found, wanted, strict=True))


def wanted_logits(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [model(batch).logits for batch in batches(seed=1)]


def requantize(model: nn.Module) -> None:
    """The plain merge into 4 bits, which the library does not have."""
    for layer in adapted_layers(model).values():
        layer.put_in_place(NF4Linear.from_quantized(quantize(layer.merged_weight()[0]), layer.base_layer.bias))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())


# --- into 4 bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nf4", [True, False])
def test_it_is_nearer_to_the_tuned_model_than_requantizing(nf4: bool) -> None:
    model = tuned(nf4)
    wanted, before = wanted_logits(model), state(model)
    requantize(model)
    plain = far_from(model, wanted)
    unmerge(model)
    merge_to_nf4(model, batches())
    assert all(isinstance(layer.base_layer, NF4Linear) for layer in adapted_layers(model).values())
    # Random tokens fill all 32 dimensions of this model, so that less can cancel than in a real one
    assert far_from(model, wanted) < 0.9 * plain
    unmerge(model)
    assert unchanged(model, before)


def test_nf4_layers_keep_their_absmax_and_the_merge_can_be_made_final() -> None:
    model = tuned()
    absmax = {path: layer.base_layer.absmax.clone() for path, layer in adapted_layers(model).items()}
    merge_to_nf4(model, batches())
    merged = logits(model)
    unload(model, merge=True)
    assert torch.equal(logits(model), merged)
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())
    for path, before in absmax.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, NF4Linear)
        assert torch.equal(layer.absmax, before)


def test_moments_that_do_not_fit_are_taken_in_several_passes() -> None:
    model, seen = tuned(), []
    wanted = wanted_logits(model)
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    merge_to_nf4(model, batches(), max_moments_bytes=4 * (32**2 * 2 + 48**2))
    # Of the 14 layers' moments, 12 of 32² numbers and 2 of 48², at most these three, or some more of the small, fit.
    assert len(seen) > 2 * len(batches())
    one_pass = tuned()
    merge_to_nf4(one_pass, batches())
    assert far_from(model, wanted) == pytest.approx(far_from(one_pass, wanted), rel=0.5)


def test_what_is_not_a_linear_layer_of_the_blocks_becomes_dense() -> None:
    model = tuned(targets=["q_proj", "embed_tokens", "lm_head"])
    merge_to_nf4(model, batches())
    kinds = {path.rpartition(".")[2]: type(layer.base_layer) for path, layer in adapted_layers(model).items()}
    assert kinds == {"q_proj": NF4Linear, "embed_tokens": nn.Embedding, "lm_head": nn.Linear}


def test_copies_and_biases_of_the_adapter_are_merged_with_it() -> None:
    model = our_model(transformers_model(CONFIGS["llama-bias"]))
    in_nf4(model)
    add_adapter(
        model, LoRAConfig(r=4, target_modules=["q_proj"], bias="all", modules_to_save=["norm"], init_lora_weights=False)
    )
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".adapters." in name and "lora" not in name:
            parameter.data += torch.randn_like(parameter)
    path = "model.layers.0.self_attn.k_proj"
    codes = model.get_submodule(path).base_layer.weight.clone()
    bias, norm = model.get_submodule(path).adapters["default"].bias, model.model.norm.adapters["default"].module.weight
    with pytest.raises(InputError, match="in full, which a LoRA cannot hold"):
        merge_to_lora(model, r=4)
    merge_to_nf4(model, [TOKENS])
    unload(model, merge=True)
    layer = model.get_submodule(path)
    assert isinstance(layer, NF4Linear), "only its bias changes"
    assert torch.equal(layer.weight, codes)
    assert torch.equal(layer.bias, bias)
    assert torch.equal(model.model.norm.weight, norm)


def merged_into_nf4() -> Transformer:
    # a wide shape, since bitsandbytes 0.50.2 dequantizes wrongly on a CPU where a row is no multiple of the block of 64
    config = LlamaConfig(**MODEL_SHAPE | {"hidden_size": 64, "intermediate_size": 128}, attention_bias=True)
    model = our_model(transformers_model(config))
    in_nf4(model)
    add_adapter(model, LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    merge_to_nf4(model, [TOKENS])
    return model


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_the_result_can_be_written_in_4_bits_and_read_bit_for_bit(max_shard_bytes: int, tmp_path: Path) -> None:
    model = merged_into_nf4()
    folder = tmp_path / "merged"
    save_pretrained(model, tiny(CHATML), folder, in_4_bits=True, max_shard_bytes=max_shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_bytes < 10**9)
    again, _ = load(folder, dtype=torch.float32)
    for path, layer in adapted_layers(model).items():
        assert torch.equal(again.get_submodule(path).weight, layer.base_layer.weight)
    assert torch.equal(our_logits(again), our_logits(model))


def test_transformers_with_bitsandbytes_loads_the_result(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = merged_into_nf4()
    save_pretrained(model, tiny(CHATML), tmp_path / "merged", in_4_bits=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu").eval()
    for path, layer in adapted_layers(model).items():
        weight = theirs.get_submodule(path).weight
        # its product on a CPU is in bfloat16, whatever the dtype: so the weights are compared
        W = bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)
        assert torch.equal(W, layer.base_layer.dequantize())
    with torch.no_grad():
        assert relative_error(theirs(TOKENS).logits, our_logits(model)) < 0.03  # three blocks of bfloat16, 2⁻⁸ each


def test_in_4_bits_needs_a_merged_model_in_4_bits(tmp_path: Path) -> None:
    model = merged_into_nf4()
    unmerge(model)
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj has an active adapter.*merge_to_nf4"):
        save_pretrained(model, tiny(CHATML), tmp_path / "merged", in_4_bits=True)
    with pytest.raises(InputError, match="no layer in NF4"):
        save_pretrained(unload(model, merge=True), tiny(CHATML), tmp_path / "merged", in_4_bits=True)
    assert not list(tmp_path.iterdir())


def test_padding_is_not_looked_at() -> None:
    model, (ids, *_) = tuned(), batches()
    paths = list(adapted_layers(model))
    plain = input_moments(model, paths, [ids[:, :20]], lambda model, batch: model(batch))
    padded = {"input_ids": ids, "attention_mask": (torch.arange(32) < 20).long().expand(4, -1)}
    without = input_moments(model, paths, [padded], lambda model, batch: model(**batch))
    for path in paths:
        torch.testing.assert_close(plain[path], without[path], rtol=1e-4, atol=1e-4)


def test_moments_are_those_of_the_inputs() -> None:
    layer, xs = nn.Linear(6, 3), [torch.randn(2, 5, 6), torch.randn(7, 6)]
    (H,) = input_moments(nn.Sequential(layer), ["0"], xs, lambda model, x: model(x)).values()
    rows = torch.cat([x.reshape(-1, 6) for x in xs]).double()
    torch.testing.assert_close(H.double(), rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert not layer._forward_pre_hooks


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = tuned(targets=["q_proj", "lm_head", "down_proj"])
    before = state(model)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj: no batch gave it an input"):
        merge_to_nf4(model, batches(), forward=lambda m, ids: m.model.layers[0].self_attn.q_proj(torch.ones(1, 3, 32)))
    assert unchanged(model, before)
    with pytest.raises(InputError, match="no batches"):
        merge_to_nf4(model, [])
    model.model.layers[1].mlp.down_proj.adapters["default"].lora_B.data[2, 1] = torch.nan
    before = state(model)
    for attempt in (lambda: merge_to_nf4(model, batches()), lambda: merge_to_lora(model, r=2)):
        with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj: merging .* gives NaN"):
            attempt()
        assert adapter_names(model) == ["default"]
        assert before.keys() == model.state_dict().keys()
    model.model.layers[0].mlp.down_proj.adapters["default"].lora_B.data[2, 1] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj: its inputs have NaN"):
        merge_to_nf4(model, batches())
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("attempt", [lambda m: merge_to_nf4(m, batches()), lambda m: merge_to_lora(m, r=2)])
def test_merged_models_and_models_without_adapters_are_refused(attempt: Any) -> None:
    with pytest.raises(InputError, match="no active adapter"):
        attempt(tiny_llama())
    model = tuned()
    merge(model)
    with pytest.raises(InputError, match="call unmerge"):
        attempt(model)


# --- into one LoRA ---------------------------------------------------------------------------------------------------


def test_with_all_ranks_together_nothing_is_lost() -> None:
    model = tuned()
    add_adapter(model, LoRAConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "second")
    set_adapter(model, ["default", "second"])
    wanted = logits(model)
    lost = merge_to_lora(model, r=7)
    assert max(lost.values()) < 1e-5  # a float32 singular value decomposition
    assert all(layer.active == ["merged"] for layer in adapted_layers(model).values())
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_what_is_lost_is_what_the_best_fit_of_this_rank_loses(r: int) -> None:
    model = tuned()
    deltas = {
        path: copy.deepcopy(layer).adapters["default"].double().delta() for path, layer in adapted_layers(model).items()
    }
    for path, lost in merge_to_lora(model, r).items():
        S = torch.linalg.svdvals(deltas[path].detach())
        assert lost == pytest.approx(((S[r:] ** 2).sum() / (S**2).sum()).sqrt().item(), rel=1e-3)  # Eckart and Young


def test_a_variant_becomes_a_lora_that_peft_loads(tmp_path: Path) -> None:
    base = tiny_llama()
    model = copy.deepcopy(base)
    add_adapter(model, LoRAConfig(r=4, use_dora=True, target_modules="all-linear"))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wanted = logits(model)
    merge_to_lora(model, r=32)  # a DoRA scales every row of W: its change has any rank
    save_adapter(model, tmp_path / "adapter", "merged")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-3, atol=1e-3)


def test_embeddings_and_convolutions_too() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(20, 8), "conv": nn.Conv1d(8, 6, 3)})
    add_adapter(model, LoRAConfig(r=2, target_modules=["words", "conv"], init_lora_weights=False))
    ids = torch.arange(12).view(2, 6)
    run = lambda: model["conv"](model["words"](ids).mT)  # noqa: E731
    nn.init.normal_(model["words"].adapters["default"].lora_A)
    wanted = run()
    merge_to_lora(model, r=4)
    torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-4)


def test_a_changed_bias_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    add_adapter(model, IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(InputError, match=r"0: .* change its bias"):
        merge_to_lora(model, r=2)
    assert adapter_names(model) == ["default"]
