"""Adapters on whole models: which layers PEFT would adapt, what they compute there, and what taking them off leaves."""

import copy
import re
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import ALL, IDS, SHAPE, close, logits, peft_model, peft_parameters, randomize, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minilora.adapters import merge
from minilora.adapters.attach import adapter_names, add_adapter, delete_adapter, disable_adapters, set_adapter
from minilora.adapters.for_training import ParameterCount, adapter_parameters, count_parameters, trainable_parameters
from minilora.adapters.layer import LoRALinear
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.merge import unload, unmerge
from minilora.adapters.targets import adapted_layers, find_targets
from minilora.errors import InputError
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.nf4.linear import NF4Linear

pytestmark = pytest.mark.filterwarnings("ignore:.*(did not match|no modules were excluded)")  # PEFT's


def adapted_llama(**config: Any) -> nn.Module:
    model = tiny_llama()
    add_adapter(model, LoRAConfig(**({"r": 4, "target_modules": ALL} | config)))
    randomize(model)
    return model


# --- which layers ----------------------------------------------------------------------------------------------------

NAMES = st.sampled_from([*ALL, "mlp.up_proj", "self_attn.v_proj", "layers.1.self_attn.q_proj", "lm_head", "proj"])
REGEXES = st.sampled_from([r".*\.(q|v)_proj", r".*layers\.0\..*_proj", r"model\.layers\.\d\.mlp\.up_proj"])
PATTERNS = st.dictionaries(
    st.sampled_from(["q_proj", r"layers\.1\.mlp\..*", "^v_proj", "v_proj", r".*\.0\.self_attn\.q_proj"]),
    st.integers(1, 6),
)

BLOCKS = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"layers_to_transform": st.sampled_from([0, 1, [], [0], [1, 0]])},
        optional={"layers_pattern": st.sampled_from(["layers", ["h", "layers"], "lay", "h", [], "lay.*"])},
    ),
)


@given(
    targets=st.one_of(st.lists(NAMES, min_size=1, max_size=4, unique=True), REGEXES, st.just("all-linear")),
    exclude=st.one_of(st.none(), st.lists(NAMES, min_size=1, max_size=2, unique=True), REGEXES),
    rank_pattern=PATTERNS,
    alpha_pattern=PATTERNS,
    blocks=BLOCKS,
    modules_to_save=st.sampled_from([None, None, ["up_proj"], ["lm_head", "self_attn"]]),
)
@settings(deadline=None, max_examples=60, report_multiple_bugs=False)
def test_targets_ranks_and_scalings_are_those_of_peft(
    targets: Any,
    exclude: Any,
    rank_pattern: dict[str, int],
    alpha_pattern: dict[str, int],
    blocks: dict[str, Any],
    modules_to_save: list[str] | None,
) -> None:
    blocks = {} if isinstance(targets, str) else blocks  # both refuse the two together, see below
    config = {
        **blocks,
        "modules_to_save": modules_to_save,
        "target_modules": targets,
        "exclude_modules": exclude,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    ours = tiny_llama()
    try:
        theirs = peft_model(tiny_llama(), r=3, lora_alpha=5, **config)
    except ValueError:  # PEFT finds no layer either
        with pytest.raises(InputError):
            add_adapter(ours, LoRAConfig(**config))
        assert not adapter_names(ours)
        return
    if isinstance(targets, list) and "proj" in targets:  # the end of a path, but of no name: PEFT skips it silently
        with pytest.raises(InputError, match="'proj' matches no layer"):
            add_adapter(ours, LoRAConfig(**config))
        config["target_modules"] = [name for name in targets if name != "proj"]
    if (
        blocks.get("layers_pattern") in ("h", "lay") and blocks["layers_to_transform"] != []
    ):  # nor are there such blocks
        with pytest.raises(InputError, match="there is no block"):
            add_adapter(ours, LoRAConfig(**config))
        return
    expected = {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    for key in ("rank_pattern", "alpha_pattern"):  # of a key that matches nothing PEFT only warns
        dead = [p for p in config[key] if not any(re.match(rf"(.*\.)?({p})$", path) for path in expected)]
        if dead:
            with pytest.raises(InputError, match=r"_pattern: .* matches no layer that is adapted"):
                add_adapter(ours, LoRAConfig(**config))
            config[key] = {pattern: value for pattern, value in config[key].items() if pattern not in dead}
    add_adapter(ours, LoRAConfig(r=3, lora_alpha=5, **config))
    found = {
        path: (layer.adapters["default"].r, layer.adapters["default"].scaling)
        for path, layer in adapted_layers(ours).items()
        if isinstance(layer.adapters["default"], LoRA)
    }
    assert found == expected


def test_experts_and_peft_s_layers_are_told_where_they_go() -> None:
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(InputError, match="its gate_up_proj can, named in target_parameters"):
        add_adapter(nn.ModuleDict({"experts": experts}), LoRAConfig(target_modules=["experts"]))
    with pytest.raises(InputError, match=r"q_proj, an adapter of PEFT: take it off with peft_model.unload\(\)"):
        add_adapter(peft_model(tiny_llama(), target_modules=["q_proj"]), LoRAConfig(target_modules=["q_proj"]))


def test_all_linear_leaves_out_the_output_head() -> None:
    ours = Transformer(ModelConfig.from_hf({**SHAPE, "model_type": "llama", "rms_norm_eps": 1e-5}))
    for model in (tiny_llama(), tiny_llama(tied=True), ours):
        targets = find_targets(model, LoRAConfig(target_modules="all-linear"))
        assert len(targets) == 2 * len(ALL)
        assert not any("lm_head" in path for path in targets)
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), NF4Linear.from_linear(nn.Linear(4, 4)))
    assert find_targets(plain, LoRAConfig(target_modules="all-linear")) == ["0", "2"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": []}, "all-linear"),
        ({"target_modules": ["q_porj"]}, r"'q_porj' matches no layer.*'q_proj'"),
        ({"target_modules": ["q_proj", "c_attn"]}, r"'c_attn' matches no layer"),
        ({"target_modules": "q_proj"}, r"nearest names are \['q_proj'.*regular expression"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"target_modules": ["input_layernorm"]}, "input_layernorm, a LlamaRMSNorm"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules=.* excludes every layer"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, "modules_to_save=.* excludes every layer"),
        ({"target_modules": ["input_layernorm"]}, "can take an adapter$"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"qproj": 2}}, r"rank_pattern: 'qproj' matches no.*'q_proj'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, r"alpha_pattern: 'v_proj' matches no layer"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"*q": 2}}, r"'\*q' is not a regular expression"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, r"'lm_haed' matches no module.*'lm_head'"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, r"no block 2; the blocks are \[0, 1\]"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"},
            r"no block 0; the blocks after 'h' are \[\]",
        ),
    ],
)
def test_targets_that_cannot_be_are_explained_and_leave_the_model_alone(config: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    before = logits(model)
    with pytest.raises(InputError, match=message):
        add_adapter(model, LoRAConfig(**config))
    assert not adapted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers_pattern": "layers"}, "give the numbers in layers_to_transform"),
        ({"target_modules": "all-linear", "layers_to_transform": 0}, "make target_modules='all-linear' a list"),
        ({"target_modules": r".*q_proj", "layers_to_transform": [0]}, "blocks' numbers into the regular expression"),
        ({"modules_to_save": "lm_head"}, r"such as \['lm_head'\]"),
        ({"bias": "some"}, "bias='some' is not one of"),
        ({"target_modules": [0, 2]}, r"target_modules must be a string or a list of strings, not \[0, 2\]"),
    ],
)
def test_settings_that_exclude_one_another_are_refused_at_once(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRAConfig(**config)


# --- what they compute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_logits_and_gradients_of_a_transformers_model_equal_peft(use_rslora: bool) -> None:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_rslora": use_rslora}
    ours, theirs = adapted_llama(**config), peft_model(tiny_llama(), **config)
    randomize(theirs)
    assert close(logits(ours), logits(theirs))
    for model in (ours, theirs):
        model(IDS, labels=IDS).loss.backward()
    expected = peft_parameters(theirs)
    for key, parameter in adapter_parameters(ours).items():
        assert close(parameter.grad, expected[key].grad), key


def test_the_same_seed_initializes_the_whole_model_as_peft_does() -> None:
    torch.manual_seed(5)
    ours = tiny_llama()
    torch.manual_seed(5)
    add_adapter(ours, LoRAConfig(r=4, target_modules=ALL))
    theirs = tiny_llama()
    torch.manual_seed(5)
    expected = peft_parameters(peft_model(theirs, r=4, target_modules=ALL))
    for key, parameter in adapter_parameters(ours).items():
        assert torch.equal(parameter, expected[key]), key


def test_bfloat16_gradients_of_a_model_are_no_further_from_float64_than_peft() -> None:
    """PEFT's low-rank products are float32 here; rounding y once, not twice, makes up for ours being bfloat16."""
    errors: dict[str, float] = {"ours": 0.0, "peft": 0.0}
    for seed in range(6):
        base = tiny_llama(seed).bfloat16()
        oracle, ours = copy.deepcopy(base), copy.deepcopy(base)
        config = {"r": 8, "lora_alpha": 16, "target_modules": ALL}
        theirs = peft_model(base, **config)
        for model in (oracle, ours):
            add_adapter(model, LoRAConfig(**config))
        for model in (oracle, ours, theirs):
            randomize(model, seed=seed)
            for key, parameter in (peft_parameters if model is theirs else adapter_parameters)(model).items():
                if key.endswith("lora_B"):
                    parameter.data *= 0.1  # |s·BAx| is then some hundredths of |Wx|, as in training
        oracle.double()
        for model in (oracle, ours, theirs):
            model(IDS, labels=IDS).loss.backward()
        exact = {key: parameter.grad for key, parameter in adapter_parameters(oracle).items()}
        for name, parameters in (("ours", adapter_parameters(ours)), ("peft", peft_parameters(theirs))):
            squares = sum(float((p.grad.double() - exact[key]).square().sum()) for key, p in parameters.items())
            errors[name] += squares / sum(float(g.square().sum()) for g in exact.values())
    assert errors["ours"] < errors["peft"]


def test_freezing_and_the_parameters_that_train() -> None:
    model = adapted_llama()
    assert list(trainable_parameters(model)) == [key for key, _ in model.named_parameters() if ".adapters." in key]
    assert list(adapter_parameters(model)) == [
        f"{path}.{matrix}" for path in adapted_layers(model) for matrix in ("lora_A", "lora_B")
    ]
    theirs = peft_model(tiny_llama(), r=4, target_modules=ALL)
    count = count_parameters(model)
    assert (count.trainable, count.total) == theirs.get_nb_trainable_parameters()


def test_an_nf4_weight_counts_as_what_it_stands_for() -> None:
    dense = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16, bias=False))
    packed = nn.Sequential(*[NF4Linear.from_linear(layer) for layer in dense])
    for model in (dense, packed):
        add_adapter(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert count_parameters(packed) == count_parameters(dense)


@pytest.mark.parametrize(
    ("trainable", "total", "text"),
    [
        (4_884_480, 139_399_488, "4.88M of 139M, 3.5%"),
        (0, 12, "0 of 12, 0.0%"),
        (999_700, 8_030_000_000, "1M of 8.03B, 0.0%"),
        (1_500, 999_400, "1.5K of 999K, 0.2%"),
    ],
)
def test_parameter_counts_read_well(trainable: int, total: int, text: str) -> None:
    assert str(ParameterCount(trainable, total)) == text


# --- several adapters ------------------------------------------------------------------------------------------------


def test_adapters_by_name_equal_peft() -> None:
    ours, theirs = tiny_llama(), peft_model(tiny_llama(), "one", r=4, target_modules=["q_proj", "v_proj"])
    theirs.add_adapter("two", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj", "up_proj"]))
    add_adapter(ours, LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]), "one")
    add_adapter(ours, LoRAConfig(r=2, lora_alpha=4, target_modules=["v_proj", "up_proj"]), "two")
    assert adapter_names(ours) == ["one", "two"]
    for name in ("one", "two"):
        randomize(ours, name)
        randomize(theirs, name)
    for names in (["one"], ["two"], ["one", "two"]):
        set_adapter(ours, names)
        theirs.base_model.set_adapter(names)
        assert close(logits(ours), logits(theirs))
        active = {key for name in names for key in adapter_parameters(ours, name)}
        trained = {re.sub(r"\.adapters\.\w+", "", key) for key in trainable_parameters(ours)}
        assert trained == active


@pytest.mark.parametrize("targets", ["all-linear", r".*q_proj.*"])
def test_a_second_adapter_goes_beside_the_first_and_not_inside_it(targets: str) -> None:
    model = tiny_llama()
    add_adapter(model, LoRAConfig(target_modules=targets), "one")
    layers = list(adapted_layers(model))
    add_adapter(model, LoRAConfig(target_modules=targets), "two")
    assert list(adapted_layers(model)) == layers
    assert all(set(layer.adapters) == {"one", "two"} for layer in adapted_layers(model).values())


def test_the_last_adapter_added_is_the_active_one_and_the_first_freezes() -> None:
    model = adapted_llama()
    model.model.norm.weight.requires_grad_(True)  # somebody wants to train this too
    add_adapter(model, LoRAConfig(target_modules=["q_proj"]), "second")
    assert all(layer.active == ["second"] for layer in adapted_layers(model).values())
    assert "model.norm.weight" in trainable_parameters(model)


@pytest.mark.parametrize("name", ["default", "", "a.b", "keys", "training", 5])
def test_a_name_that_cannot_be_is_refused(name: Any) -> None:
    model = adapted_llama()
    with pytest.raises(InputError, match=re.escape(repr(name))):
        add_adapter(model, LoRAConfig(target_modules=["q_proj"]), name)
    assert adapter_names(model) == ["default"]


def test_an_adapter_cannot_act_twice() -> None:
    model = adapted_llama()
    before = logits(model)
    with pytest.raises(InputError, match="twice"):
        set_adapter(model, ["default", "default"])
    assert torch.equal(logits(model), before)


def test_unknown_names_are_named_with_those_that_exist() -> None:
    model = adapted_llama()
    for call in (set_adapter, adapter_parameters):
        with pytest.raises(InputError, match=r"'other'.*\['default'\]"):
            call(model, "other")
    with pytest.raises(InputError, match="no adapter named 'default'; it has none yet: add_adapter"):
        set_adapter(tiny_llama(), "default")


# --- off, merged, unloaded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_model_nested_and_after_an_exception(merged: bool) -> None:
    model, base = adapted_llama(), logits(tiny_llama())
    if merged:
        merge(model)
    tuned = logits(model)
    assert not close(tuned, base)
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
        with disable_adapters(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), tuned)
    with pytest.raises(RuntimeError), disable_adapters(model):
        raise RuntimeError
    assert torch.equal(logits(model), tuned)


def test_merge_and_unmerge() -> None:
    model = adapted_llama()
    tuned, state = logits(model), copy.deepcopy(model.state_dict())
    merge(model)
    assert close(logits(model), tuned)
    for change in (
        lambda: set_adapter(model, "default"),
        lambda: add_adapter(model, LoRAConfig(target_modules=ALL), "b"),
    ):
        with pytest.raises(InputError, match=r"unmerge\(model\) first"):
            change()
    unmerge(model)
    assert torch.equal(logits(model), tuned)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_merge_of_nothing_is_refused_where_there_are_adapters() -> None:
    model = adapted_llama()
    add_adapter(model, LoRAConfig(target_modules=["q_proj"]), "second")
    delete_adapter(model, "second")  # the active one
    for call in (merge, lambda model: unload(model, merge=True)):
        with pytest.raises(InputError, match=r"no adapter is active.*\['default'\]"):
            call(model)
    assert adapter_names(model) == ["default"]
    merge(tiny_llama())


def test_a_merge_that_fails_leaves_the_whole_model_unmerged() -> None:
    model = adapted_llama()
    before = logits(model)
    broken = adapted_layers(model)["model.layers.1.mlp.up_proj"].adapters["default"].lora_A.data
    was = broken[0, 0].item()
    broken[0, 0] = float("nan")
    for change in (merge, lambda model: unload(model, merge=True)):
        with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj.*NaN"):
            change(model)
        assert not any(layer.merged for layer in adapted_layers(model).values())
    broken[0, 0] = was
    assert torch.equal(logits(model), before)


def test_a_merge_that_is_interrupted_leaves_the_whole_model_unmerged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_llama()
    layer = adapted_layers(model)["model.layers.1.mlp.up_proj"]
    monkeypatch.setattr(layer.adapters["default"], "delta", lambda: bytes(-1))  # stands for running out of memory
    with pytest.raises(ValueError, match="negative"):
        merge(model)
    assert not any(layer.merged for layer in adapted_layers(model).values())


def test_unload_gives_the_plain_model_back() -> None:
    plain = tiny_llama()
    for already_merged in (False, True):
        model = adapted_llama()
        if already_merged:
            merge(model)
        assert unload(model) is model
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert torch.equal(logits(model), logits(plain))
        assert model.state_dict().keys() == plain.state_dict().keys()


def test_unload_with_merge_gives_plain_layers_that_answer_as_tuned_and_as_peft() -> None:
    model, theirs = adapted_llama(), peft_model(tiny_llama(), r=4, target_modules=ALL)
    randomize(theirs)
    tuned = logits(model)
    unload(model, merge=True)
    assert not adapted_layers(model)
    assert close(logits(model), tuned)
    assert close(logits(model), logits(theirs.merge_and_unload()))
    assert model.state_dict().keys() == tiny_llama().state_dict().keys()


@pytest.mark.parametrize("with_merge", [False, True])
def test_unloading_from_nf4(with_merge: bool) -> None:
    layers = [NF4Linear.from_linear(nn.Linear(64, 64)), NF4Linear.from_linear(nn.Linear(64, 64))]
    model = nn.Sequential(*layers)
    add_adapter(model, LoRAConfig(target_modules=["0"]))
    randomize(model)
    x = torch.randn(3, 64)
    tuned = model(x)
    unload(model, merge=with_merge)
    assert model[1] is layers[1], "a layer without an adapter stays in 4 bits"
    if with_merge:
        assert type(model[0]) is nn.Linear
        assert close(model(x), tuned)
    else:
        assert model[0] is layers[0]


def test_deepcopy_and_state_dict_round_trip() -> None:
    model = adapted_llama()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    for parameter in trainable_parameters(twin).values():
        parameter.data.zero_()
    assert not torch.equal(logits(twin), logits(model)), "the copy shares no adapter"
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))
    assert any(isinstance(module, LoRALinear) for module in twin.modules())


def test_no_adapter_is_added_where_adapters_are_switched_off() -> None:
    """It would act in a `with` that promises the base model."""
    model = adapted_llama(target_modules=["q_proj"])
    with disable_adapters(model), pytest.raises(InputError, match="leave disable_adapters before 'two' is added"):
        add_adapter(model, LoRAConfig(target_modules=["v_proj"]), "two")
    assert adapter_names(model) == ["default"]
    add_adapter(model, LoRAConfig(target_modules=["v_proj"]), "two")
