"""Mixed batches: every row is what it is alone with its adapter, and what PEFT's `adapter_names` makes of it."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.adapters import (
    ALL,
    IDS,
    SHAPE,
    close,
    logits,
    peft_parameters,
    peft_with_adapters,
    randomize,
    tiny_llama,
    with_adapters,
)
from helpers.chat import CHATML, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, MixtralConfig, Phi3Config

from minilora.adapters import merge
from minilora.adapters.attach import add_adapter, disable_adapters, set_adapter
from minilora.adapters.for_training import adapter_parameters, trainable_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.mixed_batch import adapters_for_rows
from minilora.errors import InputError
from minilora.evaluation import evaluate, generate
from minilora.evaluation.generate import generate_tokens
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.nf4 import linear
from minilora.nf4.linear import NF4Linear
from minilora.training import train
from minilora.training.config import TrainConfig
from minilora.variants.ia3 import IA3Config
from minilora.variants.loha import LoHaConfig

CONFIGS: dict[str, dict[str, Any]] = {
    "fr": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "de": {"r": 2, "target_modules": ["v_proj", "up_proj"], "rank_pattern": {"layers.1.*v_proj": 5}},
    "pl": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
}
NAMES = ["fr", "__base__", "de", "pl", "fr"]
ROWS = torch.arange(60).reshape(5, 12) * 7 % SHAPE["vocab_size"]


def alone(model: nn.Module, names: list[str], run: Callable[[int], Tensor]) -> Tensor:
    """run(i) for every row with its adapter active, one after the other."""
    rows = []
    for i, name in enumerate(names):
        if name != "__base__":
            set_adapter(model, name)
        with disable_adapters(model) if name == "__base__" else nullcontext():
            rows.append(run(i))
    return torch.cat(rows)


Gradients = dict[tuple[str, str], Tensor]


def gradients_mixed(model: nn.Module, run: Callable[[], Tensor]) -> Gradients:
    """Of the sum of squares of a batch whose rows use NAMES, for every adapter."""
    set_adapter(model, list(CONFIGS))
    with adapters_for_rows(model, NAMES):
        run().square().sum().backward()
    return gradients(model)


def gradients_alone(model: nn.Module, run: Callable[[int], Tensor]) -> Gradients:
    """The same, summed over the rows, each run with its adapter active."""
    for i, name in enumerate(NAMES):
        if name != "__base__":
            set_adapter(model, name)
            run(i).square().sum().backward()
    return gradients(model)


def gradients(model: nn.Module) -> Gradients:
    """The adapters' gradients, which are then forgotten."""
    of = {(name, key): p.grad for name in CONFIGS for key, p in adapter_parameters(model, name).items()}
    model.zero_grad()
    return of


def close_to_scale(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, as a share of the largest number; and not zero."""
    size = b.abs().max()
    return bool(size > 0) and close(a / size, b / size)


def check_rows_alone(model: nn.Module, x: Tensor) -> None:
    """Outputs and gradients of a mixed batch are those of its rows, each alone with its adapter."""
    with torch.no_grad():
        with adapters_for_rows(model, NAMES):
            mixed = model(x)
        assert close(mixed, alone(model, NAMES, lambda i: model(x[i : i + 1])))
    expected = gradients_alone(model, lambda i: model(x[i : i + 1]))
    for key, gradient in gradients_mixed(model, lambda: model(x)).items():
        assert close_to_scale(gradient, expected[key]), key


# --- what a row computes ---------------------------------------------------------------------------------------------


@given(names=st.lists(st.sampled_from(["fr", "de", "pl", "__base__"]), min_size=5, max_size=5))
@settings(deadline=None, max_examples=8)
def test_every_row_is_what_it_is_alone_and_what_peft_makes_of_it(names: list[str]) -> None:
    ours = with_adapters(tiny_llama(), CONFIGS)
    theirs = peft_with_adapters(tiny_llama(), CONFIGS)
    with torch.no_grad():
        with adapters_for_rows(ours, names):
            mixed = ours(ROWS).logits
        expected = theirs(ROWS, adapter_names=names).logits
        separate = alone(ours, names, lambda i: ours(ROWS[i : i + 1]).logits)
    assert close(mixed, expected)
    assert close(mixed, separate)


def test_gradients_are_those_of_the_rows_alone_and_pefts() -> None:
    ours, theirs = with_adapters(tiny_llama(), CONFIGS), peft_with_adapters(tiny_llama(), CONFIGS)
    theirs.base_model.set_adapter(list(CONFIGS))
    expected = gradients_alone(ours, lambda i: ours(ROWS[i : i + 1]).logits)
    mixed = gradients_mixed(ours, lambda: ours(ROWS).logits)
    theirs(ROWS, adapter_names=NAMES).logits.square().sum().backward()
    for name in CONFIGS:
        for key, parameter in peft_parameters(theirs, name).items():
            assert close_to_scale(mixed[name, key], parameter.grad), (name, key)
            assert close_to_scale(mixed[name, key], expected[name, key]), (name, key)


def test_training_reaches_only_the_adapters_that_train() -> None:
    model = with_adapters(tiny_llama(), CONFIGS)
    set_adapter(model, "fr")
    with adapters_for_rows(model, NAMES):
        model(ROWS).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())
    assert all(parameter.grad is None for parameter in adapter_parameters(model, "de").values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_backward_inside(reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model = with_adapters(tiny_llama(), CONFIGS).train()
        set_adapter(model, list(CONFIGS))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with adapters_for_rows(model, NAMES):
            model(ROWS).logits.square().sum().backward()
        grads.append({key: parameter.grad for key, parameter in trainable_parameters(model).items() if "adap" in key})
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])


def test_a_mixed_batch_in_bfloat16_rounds_as_the_rows_alone_do() -> None:
    model = with_adapters(tiny_llama().bfloat16(), CONFIGS)
    layer = model.model.layers[0].mlp.up_proj  # "fr" and "de" are on it
    x = torch.randn(5, 3, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        with adapters_for_rows(model, NAMES):
            mixed = layer(x)
        separate = alone(model, NAMES, lambda i: layer(x[i : i + 1]))
        exact = alone(model.double(), NAMES, lambda i: layer(x[i : i + 1].double()))
    # Not bit for bit: a product of another size may sum in another order. One rounding of y errs 2⁻⁹ at most.
    error = [float((y.double() - exact).norm() / exact.norm()) for y in (mixed, separate)]
    assert error[0] < 1.05 * error[1]


SMALL = {**SHAPE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (Gemma3TextConfig(**SMALL, head_dim=8), ["embed_tokens", "q_proj", "down_proj"]),
        (Phi3Config(**SMALL), ["qkv_proj", "gate_up_proj"]),
        (MixtralConfig(**SMALL, num_local_experts=4), ["q_proj", "o_proj"]),
    ],
    ids=["gemma, whose embedding is scaled", "phi-3", "mixture of experts, its attention"],
)
def test_other_models_equal_peft(config: Any, targets: list[str]) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    ours, configs = copy.deepcopy(base), {name: {"r": 4, "target_modules": targets} for name in ("fr", "de")}
    theirs = peft_with_adapters(base, configs)
    for name, kwargs in configs.items():
        add_adapter(ours, LoRAConfig(**kwargs), name)
        with torch.no_grad():
            for key, parameter in adapter_parameters(ours, name).items():
                parameter.copy_(peft_parameter(theirs, key, name))
    names = ["de", "fr", "__base__", "fr", "de"]
    with torch.no_grad():
        with adapters_for_rows(ours, names):
            mixed = ours(ROWS).logits
        assert close(mixed, theirs(ROWS, adapter_names=names).logits)
        assert not close(mixed, base(ROWS).logits)


# --- every kind of layer, base and variant ---------------------------------------------------------------------------


class Sees(nn.Module):
    """An embedding, a Conv1d, a Conv2d with a bias and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8, padding_idx=0)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv1(self.tokens(ids).transpose(1, 2))
        return self.head(self.conv2(h[:, None]).mean((2, 3)))


def test_embeddings_convolutions_and_conv1d_equal_peft() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=11, n_positions=16, bos_token_id=1, eos_token_id=1)
    ).eval()
    parts = ["tokens", "conv1", "conv2", "head"]
    cases: list[tuple[nn.Module, dict[str, dict[str, Any]]]] = [
        (Sees(), {"fr": {"r": 4, "target_modules": parts}, "de": {"r": 2, "target_modules": ["tokens", "conv2"]}}),
        (gpt2, {"fr": {"r": 4, "target_modules": ["c_attn", "wte"]}, "de": {"r": 2, "target_modules": ["c_fc"]}}),
    ]
    names = ["de", "fr", "__base__", "fr"]
    ids = torch.arange(28).reshape(4, 7) * 3 % 11
    for base, configs in cases:
        ours = copy.deepcopy(base)
        theirs = peft_with_adapters(base, configs, task=None)
        for name, config in configs.items():
            add_adapter(ours, LoRAConfig(**config), name)
            with torch.no_grad():
                for key, parameter in adapter_parameters(ours, name).items():
                    parameter.copy_(peft_parameter(theirs, key, name))
        ours.eval()

        def run(model: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
            y = model(x, **kwargs)
            return y if isinstance(y, Tensor) else y.logits

        with torch.no_grad():
            with adapters_for_rows(ours, names):
                mixed = run(ours, ids)
            assert close(mixed, run(theirs, ids, adapter_names=names))
            assert close(mixed, alone(ours, names, lambda i, ours=ours: run(ours, ids[i : i + 1])))
        assert not close(mixed[0], mixed[1])


def peft_parameter(theirs: nn.Module, key: str, name: str) -> Tensor:
    """PEFT's parameter for one of ours; where it starts at zero it is filled, so that the adapter does something."""
    path, _, matrix = key.rpartition(".")
    layer = theirs.get_submodule(f"base_model.model.{path}")
    held = getattr(layer, matrix.replace("lora_", "lora_embedding_") if layer.lora_embedding_A else matrix)[name]
    parameter = held if isinstance(held, nn.Parameter) else held.weight
    if not parameter.any():
        nn.init.normal_(parameter, std=0.3)
    return parameter


def test_a_4_bit_weight_is_dequantized_once_for_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(NF4Linear.from_linear(nn.Linear(64, 32)))
    with_adapters(model, {name: {"r": 4, "target_modules": ["0"]} for name in ("fr", "de", "pl")})
    calls = []
    product = linear.product  # dequantizes the weight for the product at hand
    monkeypatch.setattr(linear, "product", lambda *a, **k: calls.append(1) or product(*a, **k))
    x = torch.randn(5, 3, 64)
    with torch.no_grad(), adapters_for_rows(model, NAMES):
        mixed = model(x)
    assert len(calls) == 1
    assert close(mixed, alone(model, NAMES, lambda i: model(x[i : i + 1])))


@pytest.mark.parametrize("quantized", [False, True])
def test_dora_and_lora_in_one_batch(quantized: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    model = nn.Sequential(NF4Linear.from_linear(layer) if quantized else layer)
    configs = {name: {"r": 4, "target_modules": ["0"], "use_dora": name != "de"} for name in ("fr", "de", "pl")}
    for name, config in configs.items():
        add_adapter(model, LoRAConfig(**config), name)
        for parameter in adapter_parameters(model, name).values():
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(5, 3, 64)
    check_rows_alone(model, x)


def test_any_variants_in_one_batch_on_any_layers() -> None:
    torch.manual_seed(0)
    model = Sees()
    add_adapter(model, LoRAConfig(r=2, target_modules=["tokens", "conv1", "conv2"], use_dora=True), "fr")
    add_adapter(model, LoHaConfig(r=2, target_modules=["conv2", "head"]), "de")
    add_adapter(model, IA3Config(target_modules=["conv2", "head"], feedforward_modules=["head"]), "pl")
    for name in CONFIGS:
        for parameter in adapter_parameters(model, name).values():
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    ids = torch.arange(35).reshape(5, 7) * 3 % 11
    check_rows_alone(model, ids)


# --- generate --------------------------------------------------------------------------------------------------------


def test_transformers_generate_with_its_cache_equals_peft_and_the_rows_alone() -> None:
    ours = with_adapters(tiny_llama(), CONFIGS, scale=4)
    theirs = peft_with_adapters(tiny_llama(), CONFIGS)
    for name in CONFIGS:
        expected = adapter_parameters(ours, name)
        for key, parameter in peft_parameters(theirs, name).items():
            parameter.data.copy_(expected[key])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ROWS)
    with adapters_for_rows(ours, NAMES):
        tokens = ours.generate(ROWS, attention_mask=mask, **options)
    assert torch.equal(tokens, theirs.generate(input_ids=ROWS, attention_mask=mask, adapter_names=NAMES, **options))
    separate = alone(ours, NAMES, lambda i: ours.generate(ROWS[i : i + 1], attention_mask=mask[:1], **options))
    assert torch.equal(tokens, separate)
    answers = {
        tuple(row.tolist()) for row in alone(ours, ["__base__", *CONFIGS], lambda i: ours.generate(ROWS[:1], **options))
    }
    assert len(answers) == 4, "each adapter answers in its own way"


def test_beam_search_takes_a_name_for_every_beam() -> None:
    ours, theirs = with_adapters(tiny_llama(), CONFIGS), peft_with_adapters(tiny_llama(), CONFIGS)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None}
    with adapters_for_rows(ours, [name for name in NAMES for _ in range(3)]):
        tokens = ours.generate(ROWS, **options)
    assert torch.equal(tokens, theirs.generate(input_ids=ROWS, adapter_names=NAMES, **options))


def our_llama() -> Transformer:
    model = Transformer(ModelConfig.from_hf(tiny_llama().config.to_dict()))
    model.load_state_dict(tiny_llama().state_dict())
    return with_adapters(model, CONFIGS, scale=4)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_our_generate_answers_each_prompt_through_its_adapter(batch_size: int | None) -> None:
    model = our_llama()
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(SHAPE["vocab_size"], (n,), generator=generator).tolist() for n in (40, 3, 9, 1, 9, 5)]
    prompts = [drawn[0] + rest for rest in drawn[1:]]  # a prefix worth sharing, were it not for the adapters
    expected = []
    for prompt, name in zip(prompts, NAMES, strict=True):
        with adapters_for_rows(model, [name]):
            tokens = [*prompt]
            for _ in range(12):
                with torch.no_grad():
                    tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    eos = {expected[1][3], expected[4][7]}  # two rows end before the others and leave the batch
    ends = [next((i + 1 for i, token in enumerate(row) if token in eos), 12) for row in expected]
    assert len(set(ends)) > 1
    tokens = generate_tokens(model, prompts, 12, eos, batch_size=batch_size, adapter_names=NAMES)
    assert tokens == [row[:end] for row, end in zip(expected, ends, strict=True)]
    assert len({tuple(row) for row in generate_tokens(model, [prompts[0]] * 4, 12, adapter_names=NAMES[:4])}) == 4


def test_our_generate_through_an_adapted_output_head() -> None:
    model = our_llama()
    add_adapter(model, LoRAConfig(r=4, target_modules=["lm_head"]), "head")
    randomize(model, "head")
    prompts, names = [[5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8]], ["head", "__base__", "head"]
    expected = []
    for prompt, name in zip(prompts, names, strict=True):
        with disable_adapters(model) if name == "__base__" else nullcontext():
            expected += generate_tokens(model, [prompt], 6)
    assert generate_tokens(model, prompts, 6, adapter_names=names) == expected
    assert expected[1] != expected[2]


def test_our_generate_takes_a_name_for_every_prompt() -> None:
    model, tokenizer = our_llama(), tiny(CHATML)
    for messages, names in (("hi", ["fr", "de"]), (["hi", "you"], ["fr"])):
        with pytest.raises(InputError, match=r"adapter_names has .* give one for each"):
            generate(model, tokenizer, messages, adapter_names=names)
    with pytest.raises(InputError, match="no adapter named 'it'"):
        generate(model, tokenizer, "?", adapter_names=["it"])  # a token that the model has


def test_what_orders_rows_by_length_is_refused_inside() -> None:
    """The names would be those of other rows."""
    model, tokenizer = our_llama(), tiny(CHATML)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "longer", "completion": "b"}]
    with adapters_for_rows(model, ["fr", "de"]):
        for call in (
            lambda: generate_tokens(model, [[3], [4, 5]], 4),
            lambda: evaluate(model, tokenizer, rows),
            lambda: train(model, tokenizer, rows, TrainConfig(max_steps=1), adapter="fr"),
        ):
            with pytest.raises(InputError, match=r"generate takes adapter_names=\[...\]"):
                call()


# --- states and errors -----------------------------------------------------------------------------------------------


def test_outside_the_with_the_active_adapter_acts_again_also_after_an_exception() -> None:
    model = with_adapters(tiny_llama(), CONFIGS)
    set_adapter(model, "de")
    before = logits(model)
    with adapters_for_rows(model, ["fr", "pl"]):
        outer = logits(model)
        with adapters_for_rows(model, ["__base__", "__base__"]):
            assert close(logits(model), logits(tiny_llama()))
        assert torch.equal(logits(model), outer)
        with disable_adapters(model):
            assert torch.equal(logits(model), logits(tiny_llama()))
    assert torch.equal(logits(model), before)
    with pytest.raises(RuntimeError), adapters_for_rows(model, ["fr", "pl"]):
        raise RuntimeError
    assert torch.equal(logits(model), before)


def test_names_that_cannot_be_are_explained() -> None:
    model = with_adapters(tiny_llama(), CONFIGS)
    before = logits(model)
    for names, message in (
        (["fr", "it"], r"no adapter named 'it'; it has \['de', 'fr', 'pl'\]"),
        ("fr", "a list, not 'fr'"),
    ):
        with pytest.raises(InputError, match=message), adapters_for_rows(model, names):
            pass
    with (
        pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj.*\(2, 12, 32\) has 2 rows.*given for 3"),
        adapters_for_rows(model, ["fr", "de", "fr"]),
    ):
        model(IDS)
    assert torch.equal(logits(model), before)
    with pytest.raises(InputError, match="'__base__' cannot name an adapter"):
        add_adapter(model, LoRAConfig(target_modules=ALL), "__base__")


def test_a_merged_model_is_refused_and_so_is_merging_inside() -> None:
    model = with_adapters(tiny_llama(), CONFIGS)
    with adapters_for_rows(model, ["fr", "de"]):
        merge(model)
        with pytest.raises(InputError, match=r"merged into model\.layers\.0.*unmerge\(model\) first"):
            model(IDS)
    with pytest.raises(InputError, match=r"unmerge\(model\) first"), adapters_for_rows(model, ["fr", "de"]):
        pass


def test_a_copied_module_of_several_inputs_is_named() -> None:
    model = tiny_llama()
    add_adapter(model, LoRAConfig(target_modules=["up_proj"], modules_to_save=["layers.1.self_attn"]), "fr")
    with (
        pytest.raises(InputError, match=r"model\.layers\.1\.self_attn takes more than one input"),
        adapters_for_rows(model, ["fr", "__base__"]),
    ):
        model(IDS)


class Experts(nn.Module):
    """A Mixture-of-Experts: every expert sees the tokens that the router sends it, from any row."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        choice = self.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[choice == i] = expert(x[choice == i])
        return y


def test_an_expert_that_sees_tokens_of_all_rows_is_named() -> None:
    torch.manual_seed(0)
    model = Experts()
    add_adapter(model, LoRAConfig(target_modules="all-linear"), "fr")
    with pytest.raises(InputError, match=r"experts\.0.*rows"), adapters_for_rows(model, ["fr", "__base__"]):
        model(torch.randn(2, 9, 8))
