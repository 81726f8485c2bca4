"""Adapters on models that do what other people's models do: each case was silently wrong once, or an unclear error."""

import copy
import dataclasses
import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import ARCHITECTURES
from helpers.peft import tiny_gpt2
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import minilora as ml
from minilora.adapters.adapter import adapter_class
from minilora.adapters.default_targets import DEFAULT_TARGETS
from minilora.adapters.trained_parts import OwnBias

EXACT = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order


def gemma3() -> Any:
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


def t5(**values: Any) -> Any:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, **values)
    ).eval()


def bart() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32, "init_std": 0.2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return BartForConditionalGeneration(BartConfig(vocab_size=64, **sizes, **heads)).eval()


# --- 1 and 2: ties and configurations


def test_a_merged_tied_head_leaves_the_rest_of_the_configuration_alone() -> None:
    model = gemma3()
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["lm_head"], init_lora_weights=False))
    config, a = model.config, torch.arange(3, 11)[None]
    before, y = config.to_dict(), model(input_ids=a).logits
    ml.unload(model, merge=True)
    assert model.config is config
    z = model(input_ids=a).logits
    torch.testing.assert_close(z, y, **EXACT)
    b = a.clone()
    b[0, -1] = 20
    torch.testing.assert_close(model(input_ids=b).logits[:, :-1], z[:, :-1], **EXACT)  # still causal
    after = config.to_dict()
    changed = {k for k in before if k not in ("text_config",) and before[k] != after[k]}
    assert changed <= {"tie_word_embeddings"}


@pytest.mark.parametrize("target", ["lm_head", "encoder.embed_tokens"])
def test_a_merged_head_of_more_than_a_pair_survives_the_disk(tmp_path: Path, target: str) -> None:
    model = bart()
    ml.add_adapter(model, ml.LoRAConfig(target_modules=[target], init_lora_weights=False))
    ids = torch.tensor([[5, 6, 7, 8]])
    y = model(input_ids=ids, decoder_input_ids=ids).logits
    ml.unload(model, merge=True)
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, y, **EXACT)
    model.save_pretrained(tmp_path)
    again = BartForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids, decoder_input_ids=ids).logits, y, **EXACT)


# --- 3 to 5: modules that are named but not called


def test_trained_rows_of_t5_reach_encoder_decoder_and_head_as_in_peft(tmp_path: Path) -> None:
    base = t5()
    ids = torch.tensor([[5, 6, 7]])
    model = copy.deepcopy(base)
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["q"], trainable_token_indices=[5, 6], task_type="SEQ_2_SEQ_LM"))
    with torch.no_grad():
        ml.trainable_parameters(model)["shared.adapters.default.rows"].normal_()
    y = model(input_ids=ids, decoder_input_ids=ids).logits
    encoded, before = (each.encoder(input_ids=ids).last_hidden_state for each in (model, base))
    assert (encoded - before).abs().max() > 0.1
    ml.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=ids, decoder_input_ids=ids).logits, y, **EXACT)
    ml.unload(model, merge=True)
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, y, **EXACT)
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight
    model.save_pretrained(tmp_path / "merged")
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(input_ids=ids, decoder_input_ids=ids).logits, y, **EXACT)


@pytest.mark.parametrize("config", [{"modules_to_save": ["shared"]}, {"target_modules": ["shared"]}], ids=str)
@pytest.mark.parametrize("model", [t5, bart], ids=["t5", "bart"])
def test_an_embedding_that_nobody_calls_is_refused(model: Any, config: dict[str, Any]) -> None:
    config = {"target_modules": ["q" if model is t5 else "q_proj"]} | config
    with pytest.raises(ml.InputError, match=r"shared holds a weight .*: name .*encoder\.embed_tokens"):
        ml.add_adapter(model(), ml.LoRAConfig(**config))


class ReadsTied(nn.Module):
    """A model of two layers whose head is the embedding's weight, read and not called."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.lin = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.lin(self.wte(ids)), self.wte.weight)


def test_a_parent_that_reads_the_weight_of_a_trained_copy_gets_the_copy_s() -> None:
    torch.manual_seed(0)
    model = ReadsTied()
    ids = torch.tensor([[1, 2, 3]])
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["lin"], modules_to_save=["wte"]))
    with torch.no_grad():
        for name, parameter in ml.trainable_parameters(model).items():
            if "wte" in name:
                parameter.normal_()
    y = model(ids)
    ml.unload(model, merge=True)
    torch.testing.assert_close(model(ids), y, **EXACT)


class ReadsWeight(nn.Module):
    """Reads the weight of its layer and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x), self.b.weight, self.b.bias)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"bias": "lora_only"}], ids=str)
def test_a_weight_that_is_read_and_not_called_has_the_update(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ReadsWeight()
    x = torch.randn(2, 8)
    base = model(x)
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["a", "b"], init_lora_weights=False, **config))
    with torch.no_grad():
        for parameter in ml.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    y = model(x)
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in ml.trainable_parameters(model).values())
    with ml.disable_adapters(model):
        torch.testing.assert_close(model(x), base)
    ml.merge(model)
    torch.testing.assert_close(model(x), y, **EXACT)
    ml.unmerge(model)
    with ml.adapters_for_rows(model, ["default", "__base__"]), pytest.raises(RuntimeError, match="meta"):
        model(x)


def test_mamba_under_all_linear_trains_every_adapter_and_merges_to_the_same() -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    ml.add_adapter(model, ml.LoRAConfig(target_modules="all-linear", init_lora_weights=False))
    y = model(torch.arange(4)[None]).logits
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in ml.trainable_parameters(model).values())
    ml.unload(model, merge=True)
    torch.testing.assert_close(model(torch.arange(4)[None]).logits, y, **EXACT)


# --- 6 to 10


def test_an_offloaded_base_is_refused_or_right() -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(2, 8)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    expected = model(x)
    try:
        ml.add_adapter(model, ml.LoRAConfig(target_modules=["0", "2"]))
    except ml.InputError as error:
        assert "offload" in str(error)
        torch.testing.assert_close(model(x), expected)
        return
    assert all(not parameter.is_meta for parameter in ml.trainable_parameters(model).values())
    torch.testing.assert_close(model(x), expected)


def test_whisper_s_encoder_learns_under_reentrant_checkpointing() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "num_mel_bins": 8, "vocab_size": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = WhisperConfig(
        **sizes, **heads, max_source_positions=10, max_target_positions=10, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).train()
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(input_features=torch.randn(1, 8, 20), decoder_input_ids=torch.tensor([[1, 5]])).logits.sum().backward()
    assert not [name for name, p in ml.trainable_parameters(model).items() if p.grad is None]


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.ModuleList(nn.Sequential(OrderedDict(lin=nn.Linear(4, 4))) for _ in range(2))})


def with_compiled_blocks() -> nn.Module:
    model: Any = blocks()
    for i, block in enumerate(model["blocks"]):
        model["blocks"][i] = torch.compile(block)
    return model


@pytest.mark.parametrize("name", ["lin", "blocks.1.lin"])
def test_a_compiled_block_leaves_no_trace_in_the_file(tmp_path: Path, name: str) -> None:
    model: Any = with_compiled_blocks()
    ml.add_adapter(model, ml.LoRAConfig(target_modules=[name], init_lora_weights=False))
    ml.save_adapter(model, tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "_orig_mod" in key]
    x = torch.randn(2, 4)
    for other in (blocks(), with_compiled_blocks()):
        ml.load_adapter(other, tmp_path)
        last: Any = other["blocks"][1]  # type: ignore[index]
        torch.testing.assert_close(getattr(last, "_orig_mod", last)(x), model["blocks"][1]._orig_mod(x))
        ml.unload(other)
        assert not ml.adapter_names(other)


@pytest.mark.parametrize("put", ["blocks.0._orig_mod.lin", "module.blocks.0.lin"])
def test_keys_with_what_wrappers_put_into_them_are_read(tmp_path: Path, put: str) -> None:
    model = blocks()
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["blocks.0.lin"], init_lora_weights=False))
    ml.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k.replace("blocks.0.lin", put): v for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    other = blocks()
    ml.load_adapter(other, tmp_path)
    x = torch.randn(2, 4)
    torch.testing.assert_close(other["blocks"][0](x), model["blocks"][0](x))  # type: ignore[index]


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


def test_one_layer_under_two_names_is_adapted_under_both() -> None:
    model = TwoNames()
    x = torch.randn(2, 8)
    before = model(x)
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["first", "second"], init_lora_weights=False))
    y = model(x)
    assert (y - before).abs().max() > 1e-3
    assert model.first is model.second
    ml.unload(model)
    assert torch.equal(model(x), before) and model.first is model.second


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def test_a_subclass_of_linear_merges_as_it_computes_or_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(8, 8))
    x = torch.randn(2, 8)
    try:
        ml.add_adapter(model, ml.LoRAConfig(target_modules=["0"], init_lora_weights=False))
        y = model(x)
        ml.merge(model)
    except ml.InputError as error:
        assert "Scaled" in str(error)
        return
    torch.testing.assert_close(model(x), y)


# --- errors


def test_an_adapter_file_in_float8_loads(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    plain = copy.deepcopy(model)
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["0"], init_lora_weights=False))
    ml.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    ml.load_adapter(plain, tmp_path)
    x = torch.randn(2, 16)
    assert (plain(x) - model(x)).abs().max() < 0.3


class Refuses(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("not copied")


def test_add_adapter_is_all_or_nothing() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Refuses(4, 4)})
    with pytest.raises((ml.InputError, RuntimeError)):
        ml.add_adapter(model, ml.LoRAConfig(target_modules=["a"], modules_to_save=["b"]))
    assert ml.adapter_names(model) == [] and type(model["a"]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("fails", ["set_adapter", "follow_checkpointing", "adapted"])
def test_whatever_is_raised_the_model_is_what_it_was(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].requires_grad_(False)
    before = list(model), [parameter.requires_grad for parameter in model.parameters()]
    module = sys.modules["minilora.adapters.attach"]  # the name minilora.adapters.attach is the function's

    def failing(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, fails, failing)
        ml.add_adapter(model, ml.LoRAConfig(target_modules=["0", "1"]))
    assert (list(model), [parameter.requires_grad for parameter in model.parameters()]) == before
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["0"], init_lora_weights=False), "a")
    x = torch.randn(2, 4)
    y, trained = model(x), list(ml.trainable_parameters(model))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, fails, failing)
        ml.add_adapter(model, ml.LoRAConfig(target_modules=["0", "1"], init_lora_weights=False), "b")
    assert torch.equal(model(x), y) and ml.adapter_names(model) == ["a"]
    assert list(ml.trainable_parameters(model)) == trained


def test_a_module_and_a_layer_inside_it_do_not_both_have_an_adapter() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, batch_first=True)})
    x = torch.randn(2, 3, 16)
    config = ml.LoRAConfig(target_modules=["out_proj"], target_parameters=["in_proj_weight"])
    with pytest.raises(ml.InputError, match=r"attn has an adapter, and so would attn\.out_proj inside it"):
        ml.add_adapter(model, config)
    ml.add_adapter(model, ml.LoRAConfig(target_parameters=["in_proj_weight"], init_lora_weights=False))
    y = model["attn"](x, x, x)[0]
    ml.unload(model, merge=True)
    torch.testing.assert_close(model["attn"](x, x, x)[0], y, **EXACT)


def test_a_meta_layer_has_no_weight_to_quantize() -> None:
    with pytest.raises(ml.InputError, match="meta"):
        ml.NF4Linear.from_linear(nn.Linear(64, 64, device="meta"))


@pytest.mark.parametrize("nf4", [False, True])
def test_torch_s_transformer_encoder_in_eval_with_a_padding_mask(nf4: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=mask)
    if nf4:
        for each in model.layers:
            each.linear1 = ml.NF4Linear.from_linear(each.linear1)
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights, as NF4Linear's docstring says
        try:
            with torch.no_grad():
                assert (model(x, src_key_padding_mask=mask) - expected)[~mask].abs().max() < 0.5
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["linear1", "linear2"]))
    with torch.no_grad():
        got = model(x, src_key_padding_mask=mask)
    assert (got - expected)[~mask].abs().max() < (0.5 if nf4 else 1e-5)


def test_t5_s_wo_in_4_bits_is_refused_with_the_reason_and_the_others_compute() -> None:
    model = t5(feed_forward_proj="gated-gelu")
    ids = torch.tensor([[5, 6, 7]])
    before = model.encoder(input_ids=ids).last_hidden_state
    block = model.encoder.block[0].layer[-1].DenseReluDense
    for name in ("wi_0", "wi_1"):
        setattr(block, name, ml.NF4Linear.from_linear(getattr(block, name)))
    assert (model.encoder(input_ids=ids).last_hidden_state - before).abs().max() < 0.5
    block.wo = ml.NF4Linear.from_linear(block.wo)
    with pytest.raises(ml.InputError, match=r"casts .* weight\.dtype, as T5 .* keep it whole"):
        model.encoder(input_ids=ids)


class Experts(nn.Module):
    """Of its two layers one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def test_adalora_goes_on_where_a_layer_has_no_gradient_in_a_step() -> None:
    model = Experts()
    config = ml.AdaLoRAConfig(target_modules=["first", "second"], init_r=4, target_r=2, tinit=1, tfinal=1, total_step=6)
    ml.add_adapter(model, config)
    optimizer = torch.optim.AdamW(ml.trainable_parameters(model).values(), lr=1e-2)
    for step in range(1, 7):
        model(torch.randn(2, 8)).square().mean().backward()
        optimizer.step()
        ml.after_step(model, step)
        optimizer.zero_grad()
    kept = [model.get_submodule(name).adapters["default"].kept.sum() for name in ("first", "second")]
    assert sum(kept) == 4 and kept[0] > 0
    with pytest.raises(ml.InputError, match="before zero_grad"):
        ml.add_adapter(model, config, "again")
        ml.after_step(model, 1)


# --- which task, and what else the folder says


@pytest.mark.parametrize(
    ("model", "task"), [(gemma3, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM"), (ReadsWeight, None)], ids=["gemma3", "t5", "own"]
)
def test_the_folder_names_the_task_of_the_model_and_peft_loads_it(model: Any, task: str | None, tmp_path: Path) -> None:
    ours = model()
    plain = copy.deepcopy(ours)
    names = ["a"] if task is None else ["q_proj"] if task == "CAUSAL_LM" else ["q"]
    ml.add_adapter(ours, ml.LoRAConfig(target_modules=names, init_lora_weights=False))
    ml.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
    if task is None:
        x = torch.randn(2, 8)
        torch.testing.assert_close(theirs(x), ours(x))


def test_a_readme_of_the_user_s_own_stays(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["0"]))
    (tmp_path / "README.md").write_text("Mine.")
    ml.save_adapter(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine."
    (tmp_path / "README.md").unlink()
    for _ in range(2):
        ml.save_adapter(model, tmp_path)
        assert "saved in PEFT's format" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["OLoRA", "Gaussian"])
def test_initialisations_are_named_in_any_case_as_in_peft(name: str, tmp_path: Path) -> None:
    assert ml.LoRAConfig(target_modules=["0"], init_lora_weights=name).init_lora_weights == name.lower()


def test_what_would_fail_in_the_next_forward_is_refused() -> None:
    with pytest.raises(ml.InputError, match=r"target_parameters is a list of names: \['lin.weight'\]"):
        ml.LoRAConfig(target_parameters="lin.weight")  # type: ignore[arg-type]
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "table": nn.ParameterDict({"x": nn.Parameter(torch.ones(2))})})
    with pytest.raises(ml.InputError, match="table, a ParameterDict, which is not called itself"):
        ml.add_adapter(model, ml.LoRAConfig(target_modules=["a"], modules_to_save=["table"]))


@pytest.mark.parametrize("config", [ml.LoHaConfig, ml.LoKrConfig])
def test_updates_of_a_grouped_convolution_s_own_shape_merge_as_in_peft(config: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    ml.add_adapter(model, config(target_modules=["0"], r=2, init_weights=False))
    x = torch.randn(2, 4, 6, 6)
    y = model(x)
    ml.merge(model)
    torch.testing.assert_close(model(x), y, **EXACT)
    lora = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    ml.add_adapter(lora, ml.LoRAConfig(target_modules=["0"], r=2, init_lora_weights=False))
    with pytest.raises(ml.InputError, match="groups=2"):
        ml.merge(lora)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.lin(x), x


def test_a_copied_module_that_gives_a_tuple_is_refused_in_a_mixed_batch() -> None:
    model: Any = nn.ModuleDict({"lin": nn.Linear(4, 4), "pair": Pair()})
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["lin"], modules_to_save=["pair"]))
    x = torch.randn(2, 4)
    assert len(model["pair"](x)) == 2
    with ml.adapters_for_rows(model, ["default", "__base__"]), pytest.raises(ml.InputError, match="a Pair gives more"):
        model["pair"](x)


def test_blocks_of_a_bare_model_are_chosen_by_number() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(4, 4)}) for _ in range(3))})
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["lin"], layers_to_transform=[1]))
    assert list(ml.trainable_parameters(model)) == [f"layers.1.lin.adapters.default.lora_{f}" for f in "AB"]


@pytest.mark.parametrize("modules_to_save", [["b"], ["inside"]])
def test_a_foreign_4_bit_layer_has_no_copy_and_the_model_stays_as_it_was(modules_to_save: list[str]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    foreign = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": foreign, "inside": nn.Sequential(foreign)})
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ml.InputError, match=r"(b|inside).*Linear4bit"):
        ml.add_adapter(model, ml.LoRAConfig(target_modules=["a"], modules_to_save=modules_to_save))
    assert ml.adapter_names(model) == [] and type(model["a"]) is nn.Linear and model["b"] is foreign
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


# --- where the layer is on another device than new tensors are made on

VARIANTS: dict[str, Any] = {
    **{str(start): ml.LoRAConfig(init_lora_weights=start) for start in (True, False, "gaussian")},
    "dora": ml.LoRAConfig(use_dora=True),
    "vera": ml.VeRAConfig(),
    "adalora": ml.AdaLoRAConfig(total_step=10, tinit=1, tfinal=1),
    "ia3": ml.IA3Config(feedforward_modules=[]),
    "loha": ml.LoHaConfig(),
    "lokr": ml.LoKrConfig(),
    "rows and a copy": ml.LoRAConfig(trainable_token_indices={"1": [2, 3]}, modules_to_save=["2"], bias="all"),
}


def of_ones(layer: nn.Module, device: str) -> nn.Module:
    """On a GPU that is not there no random number can be drawn."""
    for name, parameter in layer.named_parameters():
        setattr(layer, name, nn.Parameter(torch.ones(parameter.shape, device=device)))
    return layer


@pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
def test_nothing_of_a_variant_meets_on_two_devices(config: Any) -> None:
    """Fake tensors know their device, and refuse to meet one of another."""
    config = dataclasses.replace(config, target_modules=["0"])
    with FakeTensorMode():
        layer = of_ones(nn.Linear(64, 64, device="meta"), "cuda")
        variant = adapter_class(config)
        adapter = variant.build(layer, config, "0", variant.share(config, {"0": layer}))
        adapter.train_bias(layer)
        OwnBias(layer, config)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
def test_a_model_on_meta_takes_every_variant(config: Any) -> None:
    layers = nn.Linear(64, 64, device="meta"), nn.Embedding(8, 64, device="meta"), nn.LayerNorm(64, device="meta")
    model = nn.Sequential(*layers)
    ml.add_adapter(model, dataclasses.replace(config, target_modules=["0"]))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model[2](model[0](torch.ones(2, 64, device="meta"))).shape == (2, 64)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_from_weights_that_are_not_there_yet_is_refused(start: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64, device="meta"))
    with pytest.raises(ml.InputError, match=f"0: init_lora_weights='{start}' .* meta device"):
        ml.add_adapter(model, ml.LoRAConfig(target_modules=["0"], init_lora_weights=start))


# --- folders from before layers were renamed


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "rope_parameters": rope,
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()


OLD = {"gemma3": (gemma3, "language_model.model.layers"), "qwen2 vl": (qwen2_vl, "model.layers")}


@pytest.mark.parametrize("build, old", OLD.values(), ids=list(OLD))
def test_an_adapter_from_before_the_layers_of_a_vision_language_model_were_renamed(
    build: Any, old: str, tmp_path: Path
) -> None:
    model, ids = build(), torch.tensor([[5, 6, 7]])
    plain = copy.deepcopy(model)
    ml.add_adapter(model, ml.LoRAConfig(target_modules=["q_proj"], init_lora_weights=False))
    ml.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    renamed = {key.replace("model.language_model.layers", old): value for key, value in load_file(file).items()}
    save_file(renamed, file)
    if build is gemma3:  # of Qwen2-VL's PEFT 0.21.2 reads none, without a word
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
        torch.testing.assert_close(theirs(input_ids=ids).logits, model(input_ids=ids).logits, **EXACT)
    for mapping in (None, {f"^{old}": "model.language_model.layers"}):
        other = copy.deepcopy(plain)
        ml.load_adapter(other, tmp_path, key_mapping=mapping, is_trainable=False)
        assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not ml.trainable_parameters(other)
        ml.set_adapter(other, "default")
        assert ml.trainable_parameters(other)


@pytest.mark.parametrize("build", [t5, bart], ids=["t5", "bart"])
def test_beams_of_an_encoder_decoder_in_a_mixed_batch_are_those_of_each_row_alone(build: Any) -> None:
    """The encoder sees each prompt once, the decoder as many times as there are beams."""
    model = build()
    for name in ("a", "b"):
        targets = ["q", "v"] if build is t5 else ["q_proj", "fc1"]
        ml.add_adapter(model, ml.LoRAConfig(target_modules=targets, init_lora_weights=False), name)
    ids, names = torch.tensor([[5, 6, 7], [8, 9, 10], [8, 9, 10]]), ["a", "b", "__base__"]
    search = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "decoder_start_token_id": 0}
    with ml.adapters_for_rows(model, [name for name in names for _ in range(3)]):
        together = model.generate(input_ids=ids, **search)
    for row, name in enumerate(names):
        if name == "__base__":
            with ml.disable_adapters(model):
                alone = model.generate(input_ids=ids[row : row + 1], **search)
        else:
            ml.set_adapter(model, name)
            alone = model.generate(input_ids=ids[row : row + 1], **search)
        assert torch.equal(together[row], alone[0])
    with ml.adapters_for_rows(model, ["a", "b", "b", "a", "a", "a"]), pytest.raises(ml.InputError, match="has 3 rows"):
        model.generate(input_ids=ids, **search)


# --- what a model has, and what is adapted where nothing is named


def test_default_targets_are_peft_s_where_it_has_some() -> None:
    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    common = DEFAULT_TARGETS.keys() & theirs.keys()
    assert {name: DEFAULT_TARGETS[name] for name in common} == {name: theirs[name] for name in common}
    assert len(common) > 25


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_of_a_known_type_needs_no_targets(name: str) -> None:
    model = ARCHITECTURES[name].build()
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in DEFAULT_TARGETS:
        ml.add_adapter(model, ml.LoRAConfig())
        assert ml.status(model)["default"].layers >= 2
    else:
        with pytest.raises(ml.InputError, match=f"no default for '{kind}'" if kind else "name the layers"):
            ml.add_adapter(model, ml.LoRAConfig())


def test_status_tells_names_state_and_numbers() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    assert ml.status(model) == {}
    ml.add_adapter(model, ml.LoRAConfig(r=2, target_modules=["0", "1"]), "a")
    ml.add_adapter(model, ml.LoHaConfig(r=1, target_modules=["1"]), "b")
    a, b = ml.status(model).values()
    assert (a.method, a.layers, a.parameters, a.trainable, a.active) == ("LORA", 2, 2 * (8 + 4) + 2 * (4 + 2), 0, False)
    assert (b.method, b.layers, b.active, b.merged) == ("LOHA", 1, True, False) and b.trainable == b.parameters > 0
    assert a.dtypes == (torch.float32,) and a.devices == (torch.device("cpu"),)
    ml.merge(model)
    with ml.disable_adapters(model):
        assert [each.merged for each in ml.status(model).values()] == [False, True]
        assert not ml.status(model)["b"].enabled


# --- several adapters of one model


def test_rows_of_other_tokens_act_and_merge_together() -> None:
    base = tiny_gpt2()
    model, ids = copy.deepcopy(base), torch.tensor([[3, 5, 7, 9]])
    for name, tokens in (("a", [3, 5]), ("b", [7]), ("c", [5, 9])):
        ml.add_adapter(model, ml.LoRAConfig(target_modules=["c_fc"], trainable_token_indices=tokens), name)
        with torch.no_grad():
            for key, parameter in ml.trainable_parameters(model).items():
                if key.endswith("rows"):
                    parameter.normal_()
    ml.set_adapter(model, ["a", "b"])
    by_hand = copy.deepcopy(base)
    with torch.no_grad():
        for name, tokens in (("a", [3, 5]), ("b", [7])):
            by_hand.transformer.wte.weight[tokens] = model.transformer.wte.adapters[name].rows
    y = by_hand(ids).logits  # the tied head reads the same rows
    torch.testing.assert_close(model(ids).logits, y, **EXACT)
    with pytest.raises(ml.InputError, match=r"\['a', 'c'\] cannot act together"):
        ml.set_adapter(model, ["a", "c"])
    ml.unload(model, merge=True)
    torch.testing.assert_close(model(ids).logits, y, **EXACT)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_an_adapter_that_is_not_merged_is_deleted_while_another_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    for name, targets in (("a", ["0"]), ("b", ["0", "1"])):
        ml.add_adapter(model, ml.LoRAConfig(target_modules=targets, init_lora_weights=False), name)
    x = torch.randn(2, 8)
    ml.set_adapter(model, "a")
    y = model(x)
    ml.merge(model)
    ml.delete_adapter(model, "b")
    torch.testing.assert_close(model(x), y, **EXACT)
    assert ml.adapter_names(model) == ["a"] and type(model[1]) is nn.Linear
    with pytest.raises(ml.InputError, match="'a' is merged into the weights: call unmerge"):
        ml.delete_adapter(model, "a")
    ml.unmerge(model)
    ml.delete_adapter(model, "a")
    assert type(model[0]) is nn.Linear


def of_seed(seed: int, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    torch.manual_seed(seed)
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"], "init_lora_weights": False} | config
    ml.add_adapter(model, ml.LoRAConfig(**values))
    return model


@pytest.mark.parametrize(
    "config", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_alpha": 20}], ids=str
)
def test_a_swapped_adapter_computes_as_the_other_in_the_same_memory(config: dict[str, Any], tmp_path: Path) -> None:
    other = of_seed(2, **config)
    with torch.no_grad():
        for parameter in ml.trainable_parameters(other).values():
            parameter.add_(0.1)
    ml.save_adapter(other, tmp_path)
    model = of_seed(1, **{**config, "lora_alpha": 8})
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 16)
    before = compiled(x)
    memory = [parameter.data_ptr() for parameter in model.parameters()]
    ml.swap_adapter(compiled, tmp_path)
    torch.testing.assert_close(compiled(x), other(x))
    assert not torch.allclose(compiled(x), before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == memory


def test_what_all_layers_share_is_swapped_too(tmp_path: Path) -> None:
    models = [nn.Sequential(nn.Linear(16, 16)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for seed, model in enumerate(models):
        ml.add_adapter(model, ml.VeRAConfig(r=4, target_modules=["0"], projection_prng_key=seed, d_initial=0.5))
        with torch.no_grad():
            for parameter in ml.trainable_parameters(model).values():
                parameter.add_(1.0 + seed)
    ml.save_adapter(models[1], tmp_path)
    ml.swap_adapter(models[0], tmp_path)
    x = torch.randn(2, 16)
    torch.testing.assert_close(models[0](x), models[1](x))


def test_adapters_that_are_not_alike_are_not_swapped(tmp_path: Path) -> None:
    model, x = of_seed(1), torch.randn(3, 16)
    before = model(x)
    for folder, config, message in (
        ("rank", {"r": 2}, "another adapter on 0"),
        ("layers", {"target_modules": ["0"]}, "on other layers than 'default': 2"),
        ("method", {"use_dora": True}, "another adapter on 0"),
    ):
        ml.save_adapter(of_seed(2, **config), tmp_path / folder)
        with pytest.raises(ml.InputError, match=message):
            ml.swap_adapter(model, tmp_path / folder)
    assert torch.equal(model(x), before)
