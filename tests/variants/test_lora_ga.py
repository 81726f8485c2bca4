"""LoRA-GA: PEFT's A, B, outputs and training on a tiny model; gradients of frozen and of 4-bit weights."""

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import ALL, IDS, logits, peft_parameters, tiny_llama
from helpers.start import IN, KINDS, OUT, R, Start, adapter, as_linear, base, refused, rel, seeded
from helpers.training import tiny_base
from peft import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from minilora.adapters import merge
from minilora.adapters.attach import add_adapter, disable_adapters
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.targets import adapted_layers
from minilora.errors import InputError
from minilora.training.loss import language_model_loss
from minilora.variants import lora_ga

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PEFT's

FLOAT32 = 1e-5  # gradients through two blocks of sums of dozens of terms, 6e-8 each
OPTIONS: list[dict[str, Any]] = [
    {},
    {"direction": "A2rBr", "scale": "unit"},
    {"direction": "ArBr", "scale": "weight_svd"},
    {"scale": "gd_scale"},
    {"scale": "stable", "stable_gamma": 4},
]


@pytest.fixture(autouse=True)
def same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's randomized SVD draws what ours does: singular vectors then have the same signs."""
    monkeypatch.setattr(torch, "svd_lowrank", seeded(torch.svd_lowrank))


def batches() -> list[dict[str, Tensor]]:
    """Batches of unequal numbers of labels: PEFT averages over batches, and not over tokens."""
    found = []
    for i in range(3):
        labels = IDS.clone()
        labels[:, : 1 + 3 * i] = -100
        found.append({"input_ids": (IDS + 5 * i) % 64, "attention_mask": torch.ones_like(IDS), "labels": labels})
    return found


def ours(options: dict[str, Any], model: nn.Module | None = None, **config: Any) -> nn.Module:
    model = tiny_llama() if model is None else model
    config = {"r": 3, "lora_alpha": 6, "target_modules": ALL} | config
    add_adapter(model, LoRAConfig(init_lora_weights="lora_ga", lora_ga_config=options, **config))
    return model


def theirs(options: dict[str, Any], **config: Any) -> peft.PeftModel:
    model = tiny_llama()
    config = {"r": 3, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM"} | config
    config = peft.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**options), **config)

    def backward() -> None:
        for batch in batches():
            model(**batch).loss.backward()

    preprocess_loraga(model, config, backward)
    return peft.get_peft_model(model, config).eval()


def trained(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The logits and all gradients at the start, and all parameters after five steps."""
    found = {"logits": logits(model)}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    for step in range(5):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        if step == 0:
            found |= {f"{key}.grad": parameter.grad.clone() for key, parameter in parameters.items()}
        optimizer.step()
    return found | {key: parameter.detach().clone() for key, parameter in parameters.items()}


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_start_output_gradients_and_trained_parameters_equal_peft(
    options: dict[str, Any], config: dict[str, Any]
) -> None:
    model, expected = ours(options, **config), theirs(options, **config)
    lora_ga.initialize(model, batches(), forward=language_model_loss)
    wanted = peft_parameters(expected)
    for key, value in adapter_parameters(model).items():
        assert rel(value, wanted[key]) < FLOAT32, key
    found, wanted = trained(model, adapter_parameters(model)), trained(expected, wanted)
    for key, value in wanted.items():
        assert rel(found[key], value) < FLOAT32, key


def test_w_stays_and_the_start_changes_nothing() -> None:
    model = ours({})
    lora_ga.initialize(model, batches(), forward=language_model_loss)
    torch.testing.assert_close(logits(model), logits(tiny_llama()), rtol=1e-5, atol=1e-5)
    with disable_adapters(model):
        assert torch.equal(logits(model), logits(tiny_llama()))


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def pairs(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(30, IN, generator=random), torch.randn(30, OUT, generator=random)) for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_and_b_are_singular_vectors_of_the_gradient_of_any_layer(kind: str) -> None:
    """Against autograd in float64 on a dense layer of the same weights: each vector up to its sign."""
    model = ours({"scale": "unit"}, base(kind), r=R, target_modules=["0"])
    lora_ga.initialize(model, pairs(), forward=squared_error)
    plain = as_linear(base(kind)).double()
    for batch in pairs():
        (squared_error(plain, tuple(each.double() for each in batch)) / 3).backward()
    U, S, Vh = torch.linalg.svd(plain[0].weight.grad)
    A, B = (parameter.detach().double() for parameter in (adapter(model).lora_A, adapter(model).lora_B))
    # 4 iterations: (σ_17 / σ_8)^9 of the smallest vector in use is wrong
    torch.testing.assert_close((A @ Vh[:R].T).abs(), torch.eye(R).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close((U[:, R : 2 * R].T @ B).abs(), torch.diag(S[R : 2 * R]), rtol=0, atol=1e-4)


def test_random_takes_the_same_singular_pairs_for_a_and_b() -> None:
    model = ours({"direction": "random", "scale": "unit"}, base(), r=R, target_modules=["0"])
    lora_ga.initialize(model, pairs(), forward=squared_error)
    plain = base()
    for batch in pairs():
        (squared_error(plain, batch) / 3).backward()
    U, S, Vh = torch.linalg.svd(plain[0].weight.grad)
    found = (adapter(model).lora_A @ Vh.T).abs().argmax(1)
    assert len(set(found.tolist())) == R
    assert found.max() < 2 * R
    expected = U[:, found] * S[found] @ Vh[found]
    assert rel(adapter(model).lora_B @ adapter(model).lora_A, expected) < 1e-3  # float32, and 4 iterations


@pytest.mark.parametrize("layers_at_once", [1, 5])
def test_layers_by_layers_is_the_same(layers_at_once: int) -> None:
    whole, parts = ours({}), ours({})
    lora_ga.initialize(whole, batches(), forward=language_model_loss)
    lora_ga.initialize(parts, batches(), layers_at_once=layers_at_once, forward=language_model_loss)
    for key, value in adapter_parameters(whole).items():
        assert rel(adapter_parameters(parts)[key], value) < 1e-4, key


def test_gradient_checkpointing_and_bfloat16() -> None:
    ids = list(torch.randint(3, 64, (2, 2, 20), generator=torch.Generator().manual_seed(0)))
    plain, checkpointed = (ours({}, tiny_base(nf4=True), target_modules="all-linear") for _ in range(2))
    checkpointed.train().gradient_checkpointing = True
    for model in (plain, checkpointed):
        lora_ga.initialize(model, ids, forward=language_model_loss)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(plain).values())
    for key, value in adapter_parameters(plain).items():
        assert torch.equal(adapter_parameters(checkpointed)[key], value), key


def test_a_layer_without_a_gradient_starts_as_without_lora_ga() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(IN, OUT), nn.Linear(IN, OUT)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    torch.manual_seed(0)
    model = ours({}, Half(), target_modules=["used", "unused"])
    before = {key: value.clone() for key, value in adapter_parameters(model).items()}
    lora_ga.initialize(model, pairs(), forward=squared_error)
    for key, value in adapter_parameters(model).items():
        assert torch.equal(value, before[key]) == key.startswith("unused"), key
    assert not model.unused.adapters["default"].delta().any()


def test_nothing_else_gets_a_gradient_and_the_model_is_as_it_was() -> None:
    model = ours({}).train()
    model.model.norm.weight.requires_grad_(True)
    state = {key: value.clone() for key, value in model.state_dict().items() if ".adapters." not in key}
    lora_ga.initialize(model, batches(), forward=language_model_loss)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert not any(layer._forward_hooks or not layer.enabled for layer in adapted_layers(model).values())


def test_where_it_cannot_be_is_refused() -> None:
    Start("lora_ga").check_takes_linear_layers_only()
    Start("lora_ga").check_refuses(base(), "2r singular vectors", r=OUT // 2 + 1)


def infinite(model: nn.Module, batch: Any) -> Tensor:
    return squared_error(model, batch) * torch.inf


def constant(model: nn.Module, batch: Any) -> Tensor:
    return torch.ones(())


@pytest.mark.parametrize(
    ("config", "data", "options", "message"),
    [
        ({}, [], {}, "no batches"),
        ({}, pairs(), {}, "token ids .*or a mapping with input_ids.*forward="),
        ({}, pairs(), {"forward": infinite}, "loss on a batch is inf"),
        ({}, pairs(), {"forward": constant}, "depends on none"),
        ({"init_lora_weights": "gaussian"}, pairs(), {}, "init_lora_weights='gaussian', not \"lora_ga\""),
        ({}, pairs(), {"name": "other"}, "no adapter named 'other'"),
    ],
)
def test_what_stops_it_is_named_and_leaves_the_model_alone(config: Any, data: Any, options: Any, message: str) -> None:
    model = base()
    add_adapter(model, LoRAConfig(**({"r": R, "target_modules": ["0"], "init_lora_weights": "lora_ga"} | config)))
    with refused(model, message):
        lora_ga.initialize(model, data, **({"forward": language_model_loss} | options))


def test_a_merged_model_is_refused() -> None:
    model = ours({}, base(), target_modules=["0"])
    merge(model)
    with pytest.raises(InputError, match="unmerge"):
        lora_ga.initialize(model, pairs(), forward=squared_error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "up"}, "'up' is not one of"),
        ({"scale": "large"}, "'large' is not one of"),
        ({"stable_gamma": 0}, "stable_gamma must be above 0"),
        ({"gamma": 1}, "keys among direction, scale, stable_gamma"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"LoRAConfig: lora_ga_config.*{message}"):
        LoRAConfig(init_lora_weights="lora_ga", lora_ga_config=options)


def test_defaults_are_those_of_peft() -> None:
    assert LoRAConfig(init_lora_weights="lora_ga").lora_ga_config == vars(LoraGAConfig())
