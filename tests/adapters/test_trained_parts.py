"""Biases, saved modules, trainable tokens and tied pairs: PEFT's numbers, and a base model that stays as it was."""

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import IDS, logits, tiny_llama
from helpers.chat import CHATML, tiny
from helpers.peft import FLOAT32, assert_same_logits_and_gradients, check_both_ways, ours_on, peft_on, shake, tiny_gpt2
from helpers.training import LLAMA, quantized, random_rows, run, trained
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from minilora.adapters import merge
from minilora.adapters.attach import adapter_names, add_adapter, disable_adapters, set_adapter
from minilora.adapters.for_training import adapter_parameters, after_step, trainable_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.merge import unload, unmerge
from minilora.adapters.mixed_batch import adapters_for_rows
from minilora.errors import InputError
from minilora.formats import load, save_pretrained
from minilora.formats.peft import load_adapter, save_adapter
from minilora.merging.into_nf4 import merge_to_nf4
from minilora.merging.report import merge_report
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.nf4.linear import NF4Linear
from minilora.variants.adalora import AdaLoRAConfig
from minilora.variants.ia3 import IA3Config
from minilora.variants.loha import LoHaConfig
from minilora.variants.lokr import LoKrConfig
from minilora.variants.vera import VeRAConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(tie_word_embeddings|save_embedding_layers|fan_in_fan_out|ensure_weight_tying|missing keys|config file)"
)

MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "tied llama": lambda: tiny_llama(tied=True)}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bias of the adapted layers": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "all biases and DoRA": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "all", "use_dora": True}),
    "all biases and a saved module": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f", "h.1.mlp.c_fc"]},
    ),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a tied pair's head": ("tied llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a tied pair's embedding": ("tied llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "a container": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp", "norm"]}),
    "tied, saved": (
        "tied llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [63, 1, 7]}),
    "tokens of a tied pair": ("tied llama", {"target_modules": ["q_proj"], "trainable_token_indices": [63, 1, 7]}),
    "other tokens for the head": (
        "tied llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 1], "lm_head": [0, 7, 5]}},
    ),
    "tokens of positions": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wpe": [0, 3]}}),
    "LoRA on the embedding of a tied pair": ("tied llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "LoRA on the head of a tied pair": ("tied llama", {"target_modules": ["lm_head", "q_proj"]}),
    "LoRA on both": ("tied llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    "LoRA tied": (
        "tied llama",
        {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    ),
    "LoRA tied, by the embedding": (
        "tied llama",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_starts_as_the_base_model_and_trains_what_peft_does_by_the_same_gradients(case: str) -> None:
    model, config = CASES[case]
    base = MODELS[model]()
    theirs = peft_on(base, config)
    ours = ours_on(copy.deepcopy(base), config)
    assert torch.allclose(logits(ours), logits(base), **FLOAT32)
    shake(ours)
    assert_same_logits_and_gradients(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_both_ways_through_the_folder(case: str, tmp_path: Path) -> None:
    model, config = CASES[case]
    base = MODELS[model]()
    ours = ours_on(copy.deepcopy(base), config)
    shake(ours)
    assert not torch.allclose(logits(ours), logits(base), **FLOAT32)
    check_both_ways(ours, base, tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_switched_merged_unmerged_and_unloaded(case: str) -> None:
    model, config = CASES[case]
    base = MODELS[model]()
    ours = ours_on(copy.deepcopy(base), config)
    shake(ours)
    plain, tuned = logits(base), logits(ours)
    ours_on(ours, config, "other")
    torch.testing.assert_close(logits(ours), plain, **FLOAT32)
    shake(ours, "other", seed=2)
    other = logits(ours)
    assert not torch.allclose(other, tuned, **FLOAT32)
    set_adapter(ours, "default")
    assert torch.equal(logits(ours), tuned)
    with disable_adapters(ours):
        assert torch.equal(logits(ours), plain)
    if case != "tokens of positions":  # the positions of all rows are looked up as one
        with torch.no_grad(), adapters_for_rows(ours, ["default", "other"]):
            rows = ours(IDS).logits
        torch.testing.assert_close(rows, torch.stack([tuned[0], other[1]]), **FLOAT32)
    merge(ours)
    torch.testing.assert_close(logits(ours), tuned, **FLOAT32)
    with disable_adapters(ours):
        assert torch.equal(logits(ours), plain)
    unmerge(ours)
    assert torch.equal(logits(ours), tuned)
    twin = copy.deepcopy(ours)
    unload(twin, merge=True)
    torch.testing.assert_close(logits(twin), tuned, **FLOAT32)
    assert twin.state_dict().keys() == base.state_dict().keys()
    unload(ours)
    assert torch.equal(logits(ours), plain)
    for name, tensor in base.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_the_module_that_a_merge_sets_aside_follows_train_and_eval() -> None:
    model = nn.Sequential()
    model.up, model.head = nn.Linear(8, 8), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8))
    add_adapter(model, LoRAConfig(r=2, target_modules=["up"], modules_to_save=["head"]))
    merge(model)
    model.eval()
    x = torch.randn(2, 8)
    with disable_adapters(model):
        y = model(x)
    unmerge(model)
    with disable_adapters(model):
        assert torch.equal(model(x), y)
    torch.testing.assert_close(y, model.head.base_layer[1](model.up.base_layer(x)))


# --- minilora's own model: training, and the merged folder ------------------------------------------------------------

TRAINED: dict[str, dict[str, Any]] = {
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "head and norm": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    "a block": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"], "bias": "lora_only"},
    "tied, saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [40, 5]},
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [40, 5]}},
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "LoRA tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
}


def tiny_transformer(nf4: bool = False) -> Transformer:
    """Tied, with biases that are not zero."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_hf({**LLAMA, "attention_bias": True, "mlp_bias": True})).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.3)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return quantized(model) if nf4 else model


@pytest.mark.parametrize("nf4", [False, True], ids=["float32", "NF4 and bfloat16"])
@pytest.mark.parametrize("case", TRAINED)
def test_training_and_a_resumed_training_give_one_adapter_and_touch_nothing_else(
    case: str, nf4: bool, tmp_path: Path
) -> None:
    settings = {"max_steps": 4, "save_every": 2, "keep_last": 2, "resume": "auto"}
    results = []
    for _ in range(2):
        model = ours_on(tiny_transformer(nf4), TRAINED[case])
        before = trained(model)
        result = run(model, random_rows(16), tmp_path, **settings)
        results.append(trained(model))
        shutil.rmtree(tmp_path / "checkpoint-000004")  # so that the second run goes on after step 2
    for name, tensor in results[0].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, results[1][name]), name
        assert name.endswith("lora_A") or not torch.equal(tensor, before[name]), name
    again, base = tiny_transformer(nf4), tiny_transformer(nf4)
    load_adapter(again, result.adapter_dir)
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    with disable_adapters(model):
        assert torch.equal(logits(model), logits(base))


class CountingNorm(nn.LayerNorm):
    """A module whose training changes more than its parameters."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x)


def test_a_resumed_training_goes_on_with_the_buffers_of_a_copy(tmp_path: Path) -> None:
    for _ in range(2):
        model = tiny_transformer()
        model.model.norm = CountingNorm(32)
        ours_on(model, {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]})
        run(model, random_rows(16), tmp_path, max_steps=4, save_every=2, keep_last=2, resume="auto")
        assert (model.model.norm.adapters["default"].module.calls, model.model.norm.base_layer.calls) == (4, 0)
        shutil.rmtree(tmp_path / "checkpoint-000004")


@pytest.mark.parametrize("case", TRAINED)
def test_the_merged_folder_computes_the_same_in_transformers_and_here(case: str, tmp_path: Path) -> None:
    model = ours_on(tiny_transformer(), TRAINED[case])
    shake(model)
    answer = logits(model)
    save_pretrained(model, tiny(CHATML), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(theirs), answer, **FLOAT32)
    again, _ = load(tmp_path, quantize=None, dtype=torch.float32)
    torch.testing.assert_close(logits(again), answer, **FLOAT32)
    stays_tied = case in ("biases", "a block", "tied, saved", "tokens", "LoRA tied")
    assert theirs.config.tie_word_embeddings == stays_tied
    assert torch.equal(logits(model), answer)
    unload(model, merge=True)
    assert model.config.tie_word_embeddings == stays_tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == stays_tied


@pytest.mark.parametrize("case", [case for case, (model, _) in CASES.items() if model != "llama"])
def test_an_unloaded_transformers_model_is_saved_as_what_it_computes(case: str, tmp_path: Path) -> None:
    model, config = CASES[case]
    ours = ours_on(MODELS[model](), config)
    shake(ours)
    answer = logits(ours)
    unload(ours, merge=True).save_pretrained(tmp_path)
    theirs = type(ours).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(theirs), answer, **FLOAT32)


def test_a_copy_of_a_4_bit_layer_is_dense_and_trains_in_float32() -> None:
    model = nn.Sequential(NF4Linear.from_linear(nn.Linear(64, 8)), nn.Linear(8, 8).bfloat16())
    x = torch.randn(3, 64).bfloat16()
    before = model(x)
    add_adapter(model, LoRAConfig(target_modules=["1"], modules_to_save=["0"]))
    # the copy multiplies by what the codes stand for, rounded to bfloat16 as there
    assert torch.allclose(model(x), before, rtol=2**-6, atol=2**-6)
    model(x).float().square().sum().backward()
    copied = adapter_parameters(model)["0.module.weight"]
    assert copied.dtype == copied.grad.dtype == torch.float32
    assert copied.grad.abs().sum() > 0


def test_the_rows_of_tokens_take_the_memory_of_these_rows() -> None:
    model = tiny_llama(tied=True)
    add_adapter(model, LoRAConfig(target_modules=["q_proj"], trainable_token_indices=[3, 9]))
    rows = [p for name, p in trainable_parameters(model).items() if "lora" not in name]
    assert [tuple(p.shape) for p in rows] == [(2, 32)]
    model(IDS, labels=IDS).loss.backward()
    assert model.model.embed_tokens.base_layer.weight.grad is None


# --- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_of_a_frozen_model_give_the_same_gradients(use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = ours_on(tiny_llama(), {"target_modules": "all-linear"}).train()
        shake(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model = copy.deepcopy(model)
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)
    assert not unload(model)._forward_pre_hooks


# --- layers of other kinds, and half precision ------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_convolutions(bias: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2)).eval()
    x = torch.randn(2, 3, 6, 6)
    ours = copy.deepcopy(base)
    add_adapter(ours, LoRAConfig(r=2, target_modules=["0"], bias=bias, task_type=None))
    shake(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    tuned = ours(x)
    torch.testing.assert_close(theirs(x), tuned, **FLOAT32)
    torch.testing.assert_close(ours(x[0:1]), tuned[0:1], **FLOAT32)
    torch.testing.assert_close(unload(ours, merge=True)(x), tuned, **FLOAT32)


def test_a_copy_keeps_and_saves_statistics_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    x = 3 + torch.randn(8, 4)
    ours = copy.deepcopy(base)
    add_adapter(ours, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"], task_type=None))
    ours.train()(x)  # moves the running mean and counts, as integers
    save_adapter(ours.eval(), tmp_path)
    assert not torch.allclose(ours(x), base(x), **FLOAT32)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(x), ours(x), **FLOAT32)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), ours(x))
    with disable_adapters(ours):
        assert torch.equal(ours(x), base(x))


@pytest.mark.parametrize("case", TRAINED)
def test_on_a_bfloat16_model_it_is_float32_rounded_where_it_is_used(case: str) -> None:
    exact, rounded = (ours_on(tiny_transformer().to(dtype), TRAINED[case]) for dtype in (torch.double, torch.bfloat16))
    for model in (exact, rounded):
        shake(model)
    with torch.no_grad():  # the weights of both are those that bfloat16 has
        for (_, a), (_, b) in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
            a.copy_(b.to(a.dtype))
        error = rounded(IDS).double() - exact(IDS)
        # A dozen roundings of 2^-9 on the way; an adapter that were not there would be wrong by far more.
        assert error.norm() < 2**-5 * exact(IDS).norm()
        with disable_adapters(exact):
            assert (exact(IDS) - rounded(IDS).double()).norm() > 2**-4 * exact(IDS).norm()
    assert all(parameter.dtype == torch.float32 for parameter in adapter_parameters(rounded).values())


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trainable_token_indices": [64]}, "64 is no token id of model.embed_tokens, which has 0 to 63"),
        ({"trainable_token_indices": [-1]}, "-1 is no token id"),
        ({"trainable_token_indices": [1, 1]}, "some of them are there twice"),
        ({"trainable_token_indices": []}, "are none"),
        ({"trainable_token_indices": {"embed_token": [1]}}, r"'embed_token' matches no layer; .*'embed_tokens'"),
        ({"trainable_token_indices": {"norm": [1]}}, "a LlamaRMSNorm, has no row for each token"),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "rows of model.embed_tokens, which target_modules or modules_to_save names too",
        ),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
            "rows of model.embed_tokens, which target_modules",
        ),
        (
            {"modules_to_save": ["self_attn", "k_proj"], "target_modules": ["up_proj"]},
            "self_attn.k_proj inside it",
        ),
        (
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
            "differ between model.embed_tokens and lm_head",
        ),
        ({"target_modules": ["lm_head"], "ensure_weight_tying": True, "use_dora": True}, "plain LoRA"),
        ({"ensure_weight_tying": True}, "neither model.embed_tokens nor lm_head is named for training"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_and_leaves_the_model_alone(config: dict[str, Any], message: str) -> None:
    model = tiny_llama(tied=True)
    before = logits(model)
    with pytest.raises(InputError, match=message) as caught:
        add_adapter(model, LoRAConfig(**{"target_modules": ["q_proj"]} | config))
    assert "\n" not in str(caught.value)
    assert not adapter_names(model)
    assert torch.equal(logits(model), before)


def test_a_model_that_is_not_tied_cannot_be_kept_tied() -> None:
    config = LoRAConfig(target_modules=["lm_head", "embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(InputError, match="no layer of the model shares the embedding's weight"):
        add_adapter(tiny_llama(), config)


def test_two_copies_of_one_module_cannot_act_together() -> None:
    model = tiny_llama()
    config = LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    add_adapter(model, config, "one")
    add_adapter(model, config, "two")
    with pytest.raises(InputError, match=r"\['one', 'two'\] cannot act together: one of them puts a lm_head"):
        set_adapter(model, ["one", "two"])
    add_adapter(model, LoRAConfig(target_modules=["q_proj"], bias="lora_only"), "three")
    set_adapter(model, ["one", "three"])
    assert math.isfinite(logits(model).sum())


@pytest.mark.parametrize("targets", [["up_proj"], "all-linear"])
def test_layers_inside_another_adapters_copy_are_not_left_out_silently(targets: Any) -> None:
    model = ours_on(tiny_llama(), {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp"]}, "one")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.\w+, and another adapter has its own model\.layers\.0\.mlp"):
        ours_on(model, {"target_modules": targets}, "two")
    ours_on(model, {"target_modules": targets, "exclude_modules": r".*layers\.0\.mlp.*"}, "two")


def test_biases_of_several_adapters_add_up() -> None:
    model = tiny_gpt2()
    for name in ("one", "two"):
        ours_on(model, {"target_modules": ["c_attn"], "bias": "all"}, name)
        shake(model, name, seed=len(name) + ord(name[0]))
    set_adapter(model, ["one", "two"])
    b = model.transformer.h[0].ln_1.base_layer.bias
    one, two = (adapter_parameters(model, name)["transformer.h.0.ln_1.bias"] for name in ("one", "two"))
    seen: list[Tensor] = []
    model.transformer.h[0].ln_1.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    both = logits(model)
    x, y = seen
    base = tiny_gpt2().transformer.h[0].ln_1
    torch.testing.assert_close(y, base(x) + (one - b) + (two - b), **FLOAT32)
    merge(model)
    torch.testing.assert_close(logits(model), both, **FLOAT32)


def test_a_layer_that_attention_reads_without_calling_it_learns_all_the_same() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 3, 16)
    base = model(x)
    add_adapter(model, LoRAConfig(target_modules=["out_proj"], bias="all", init_lora_weights=False))
    y = model(x)
    y.square().sum().backward()
    parameters = adapter_parameters(model)
    assert {"self_attn.out_proj.bias", "self_attn.out_proj.lora_A", "norm1.bias"} < parameters.keys()
    assert all(parameter.grad is not None for parameter in parameters.values())
    assert (y - base).abs().max() > 1e-2
    with torch.no_grad():  # in one kernel of torch's, which reads the weights
        torch.testing.assert_close(model(x), y, **FLOAT32)
        torch.testing.assert_close(unload(copy.deepcopy(model), merge=True)(x), y, **FLOAT32)
    other = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    add_adapter(other, LoRAConfig(target_modules="all-linear", modules_to_save=["self_attn"]))
    assert {name.rpartition(".")[0] for name in adapter_parameters(other)} >= {"linear1", "linear2", "self_attn.module"}


def test_reports_and_4_bit_merges_pass_over_what_is_no_update() -> None:
    config = {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["model.norm"]}
    model = ours_on(tiny_transformer(), config)
    shake(model)
    targets = {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert {row.layer for row in merge_report(model).rows} == targets
    merge_to_nf4(model, [IDS], forward=lambda model, ids: model(ids))
    assert {path for path, module in model.named_modules() if isinstance(module, NF4Linear)} == {
        f"{path}.base_layer" for path in targets
    }
    assert model.model.norm.merged == model.model.layers[0].mlp.up_proj.merged == ["default"]


def test_torchs_encoder_layer_does_not_pass_an_adapter_by() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    base = model(x)
    add_adapter(model, LoRAConfig(target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():  # where the layer would take the weights into one kernel of its own
        tuned = model(x)
    assert not torch.allclose(tuned, base, **FLOAT32)
    with torch.no_grad():
        torch.testing.assert_close(unload(copy.deepcopy(model), merge=True)(x), tuned, **FLOAT32)
    torch.testing.assert_close(unload(model)(x), base, **FLOAT32)


# --- other methods than LoRA ------------------------------------------------------------------------------------------

GPT2_PARTS = {"target_modules": ["c_fc"], "modules_to_save": ["ln_f", "lm_head"]}
LLAMA_PARTS = {"target_modules": ["up_proj"], "modules_to_save": ["model.norm", "lm_head"], "layers_to_transform": [1]}
METHODS = {
    "IA3": ("gpt2", IA3Config(feedforward_modules=[], **GPT2_PARTS)),
    "VeRA": ("gpt2", VeRAConfig(r=4, bias="vera_only", **GPT2_PARTS)),
    "AdaLoRA": ("gpt2", AdaLoRAConfig(init_r=4, target_r=2, total_step=100, bias="all", **GPT2_PARTS)),
    "LoHa": ("llama", LoHaConfig(r=2, **LLAMA_PARTS)),  # PEFT's LoHa and LoKr know no Conv1D
    "LoKr": ("tied llama", LoKrConfig(r=2, **LLAMA_PARTS)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_method_takes_them_along(method: str, tmp_path: Path) -> None:
    model, config = METHODS[method]
    base = MODELS[model]()
    ours = copy.deepcopy(base)
    add_adapter(ours, config)
    shake(ours)
    ours(IDS, labels=IDS).loss.backward()
    after_step(ours, 1)
    for name, parameter in adapter_parameters(ours).items():
        assert parameter.grad is not None, name
    check_both_ways(ours, base, tmp_path)
    with disable_adapters(ours):
        assert torch.equal(logits(ours), logits(base))
    tuned = logits(ours)
    torch.testing.assert_close(logits(unload(ours, merge=True)), tuned, **FLOAT32)
