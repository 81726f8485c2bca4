"""Adapters that start at B₀A₀ ≠ 0 in files: PEFT reads ours, we read PEFT's, and what cannot be read is refused."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import ALL, FLOAT32, IDS, logits, tiny_llama
from helpers.peft import tiny_gpt2
from helpers.training import PADDING, random_rows, tiny_base
from peft import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from minilora.adapters import merge
from minilora.adapters.attach import adapters_named, add_adapter
from minilora.adapters.for_training import trainable_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError
from minilora.formats.peft import load_adapter, save_adapter
from minilora.nf4.linear import NF4Linear
from minilora.training import train
from minilora.training.config import TrainConfig
from minilora.training.loss import language_model_loss
from minilora.variants import lora_ga
from minilora.variants.ia3 import IA3Config

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),  # PEFT's
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # PEFT's
]

BATCHES = [{"input_ids": IDS, "labels": IDS}]

DERIVABLE = ["pissa", "olora"]
LOST = ["pissa_niter_4", "lora_ga"]

CONFIGS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {
        "use_rslora": True,  # with patterns, which PEFT's own conversion cannot do
        "rank_pattern": {"k_proj": 6, r"layers\.1\.mlp\..*": 2},
        "alpha_pattern": {"k_proj": 7, "up_proj": 5},
    },
]


def trained(model: nn.Module) -> nn.Module:
    """After a few steps, so that neither A nor B is where it started."""
    parameters = (
        trainable_parameters(model) if not isinstance(model, peft.PeftModel) else dict(model.named_parameters())
    )
    optimizer = torch.optim.AdamW([p for p in parameters.values() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


def ours(init: str, model: nn.Module | None = None, **config: Any) -> nn.Module:
    model = tiny_llama() if model is None else model
    config = {"r": 4, "lora_alpha": 6, "target_modules": ALL} | config
    add_adapter(model, LoRAConfig(init_lora_weights=init, **config))
    if init == "lora_ga":
        lora_ga.initialize(model, BATCHES, forward=language_model_loss)
    return trained(model)


def theirs(init: str, folder: Path | None = None, **config: Any) -> peft.PeftModel:
    """PEFT's, trained; with `folder`, saved there before training, for PEFT's own conversion."""
    model = tiny_llama()
    config = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM"} | config
    if init == "lora_ga":
        config["lora_ga_config"] = LoraGAConfig()
    config = peft.LoraConfig(init_lora_weights=init, **config)
    if init == "lora_ga":
        preprocess_loraga(model, config, lambda: model(**BATCHES[0]).loss.backward())
    model = peft.get_peft_model(model, config)
    if folder is not None:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder)
        model.peft_config["default"].init_lora_weights = init
    return trained(model)


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def loaded_by_peft(folder: Path) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(tiny_llama(), folder).eval()


def loaded_by_us(folder: Path) -> nn.Module:
    model = tiny_llama()
    load_adapter(model, folder)
    return model


# --- both ways -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("init", DERIVABLE)
def test_a_derivable_start_goes_both_ways_as_it_is(tmp_path: Path, init: str, config: dict[str, Any]) -> None:
    model, expected = ours(init, **config), theirs(init, **config)
    save_adapter(model, tmp_path / "ours")
    expected.save_pretrained(tmp_path / "theirs")
    assert config_in(tmp_path / "ours")["init_lora_weights"] == init
    assert config_in(tmp_path / "ours")["r"] == 4
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path / "ours")), logits(model), **FLOAT32)
    torch.testing.assert_close(logits(loaded_by_us(tmp_path / "ours")), logits(model), **FLOAT32)
    torch.testing.assert_close(logits(loaded_by_us(tmp_path / "theirs")), logits(expected), **FLOAT32)
    assert not torch.allclose(logits(model), logits(tiny_llama()), rtol=0.1, atol=0.1), "or nothing was tested"


def test_updates_of_parameters_alone_are_plain_as_they_are(tmp_path: Path) -> None:
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.weights = nn.Parameter(torch.randn(4, 8, 8))
    add_adapter(model, LoRAConfig(r=2, target_parameters=["experts.weights"]))
    save_adapter(model, tmp_path, as_lora=True)
    assert config_in(tmp_path)["target_parameters"] == ["experts.weights"]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("init", [*DERIVABLE, *LOST, "orthogonal", "gaussian"])
def test_as_plain_lora_any_adapter_serves_anywhere(tmp_path: Path, init: str, config: dict[str, Any]) -> None:
    model = ours(init, **config)
    save_adapter(model, tmp_path, as_lora=True)
    written = config_in(tmp_path)
    times = 1 if init in ("orthogonal", "gaussian") else 2
    assert written["init_lora_weights"] is True
    assert written["lora_ga_config"] is None
    assert written["r"] == 4 * times
    assert written["rank_pattern"] == {key: r * times for key, r in config.get("rank_pattern", {}).items()}
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path)), logits(model), **FLOAT32)
    again = loaded_by_us(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), **FLOAT32)
    scalings = [
        {path: each.scaling for path, each in adapters_named(each_model, "default").items()}
        for each_model in (model, again)
    ]
    assert scalings[0] == pytest.approx(scalings[1])
    assert next(iter(adapters_named(model, "default").values())).config.init_lora_weights == init, (
        "the model's own stays"
    )
    if times == 2 and not config:
        assert written["lora_alpha"] == 12
    if config == {"use_rslora": True}:
        assert written["lora_alpha"] == pytest.approx(6 * math.sqrt(times))


def test_olora_on_a_conv1d_which_peft_starts_elsewhere(tmp_path: Path) -> None:
    """GPT-2's attn.c_proj is square, so that no shape would tell."""
    model = ours("olora", tiny_gpt2(), target_modules=["attn.c_proj"])
    save_adapter(model, tmp_path / "ours")
    assert config_in(tmp_path / "ours")["init_lora_weights"] is True
    by_peft = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(by_peft), logits(model), **FLOAT32)
    loaded = tiny_gpt2()
    load_adapter(loaded, tmp_path / "ours")
    torch.testing.assert_close(logits(loaded), logits(model), **FLOAT32)

    config = peft.LoraConfig(target_modules=["attn.c_proj"], init_lora_weights="olora", fan_in_fan_out=True)
    peft.get_peft_model(tiny_gpt2(), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(InputError, match=r"'olora' on transformer.h.0.attn.c_proj, a Conv1D"):
        load_adapter(tiny_gpt2(), tmp_path / "theirs")


@pytest.mark.parametrize("init", LOST)
def test_a_start_that_would_be_lost_is_written_as_plain_lora_without_asking(tmp_path: Path, init: str) -> None:
    model = ours(init)
    save_adapter(model, tmp_path)
    assert config_in(tmp_path)["init_lora_weights"] is True
    assert config_in(tmp_path)["r"] == 8
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path)), logits(model), **FLOAT32)


def test_lora_ga_without_its_data_yet_has_no_start_to_write(tmp_path: Path) -> None:
    model = tiny_llama()
    add_adapter(model, LoRAConfig(r=4, target_modules=ALL, init_lora_weights="lora_ga"))
    trained(model)
    save_adapter(model, tmp_path)
    assert config_in(tmp_path)["r"] == 4
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path)), logits(model), **FLOAT32)


def test_a_base_in_4_bits_has_another_start_than_the_full_weights(tmp_path: Path) -> None:
    def packed() -> nn.Module:
        model = tiny_llama()
        for block in model.model.layers:
            block.mlp.up_proj = NF4Linear.from_linear(block.mlp.up_proj)
        return model

    model = ours("pissa", packed())
    save_adapter(model, tmp_path / "packed")
    assert config_in(tmp_path / "packed")["init_lora_weights"] is True
    again = packed()
    load_adapter(again, tmp_path / "packed")
    torch.testing.assert_close(logits(again), logits(model), **FLOAT32)
    merge(model)  # and so it is while the layers are merged, which makes them dense
    save_adapter(model, tmp_path / "packed")
    assert config_in(tmp_path / "packed")["init_lora_weights"] is True

    save_adapter(ours("pissa"), tmp_path / "dense")
    untouched = packed()
    with pytest.raises(InputError, match=r"adapter_config\.json.*up_proj is in 4 bits.*as_lora=True"):
        load_adapter(untouched, tmp_path / "dense")
    torch.testing.assert_close(logits(untouched), logits(packed()), rtol=0, atol=0)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_what_else_an_adapter_trains_is_written_beside_it(tmp_path: Path, bias: str) -> None:
    model = ours("pissa", modules_to_save=["lm_head"], bias=bias)
    for as_lora in (False, True):
        save_adapter(model, tmp_path, as_lora=as_lora)
        assert config_in(tmp_path)["modules_to_save"] == ["lm_head"]
        torch.testing.assert_close(logits(loaded_by_us(tmp_path)), logits(model), **FLOAT32)
        torch.testing.assert_close(logits(loaded_by_peft(tmp_path)), logits(model), **FLOAT32)


def test_another_method_is_no_lora(tmp_path: Path) -> None:
    model = tiny_llama()
    add_adapter(model, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    with pytest.raises(InputError, match="as_lora: IA3 is another method"):
        save_adapter(model, tmp_path, as_lora=True)
    assert not list(tmp_path.iterdir())


# --- folders of PEFT whose start is not in them ----------------------------------------------------------------------


@pytest.mark.parametrize("init", LOST)
def test_what_peft_did_not_convert_is_refused_and_what_it_did_is_read(tmp_path: Path, init: str) -> None:
    expected = theirs(init, tmp_path / "start")
    expected.save_pretrained(tmp_path / "raw")
    model = tiny_llama()
    with pytest.raises(
        InputError, match=rf"raw/adapter_config\.json: init_lora_weights='{init}'.*convert it"
    ) as caught:
        load_adapter(model, tmp_path / "raw")
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(logits(model), logits(tiny_llama()), rtol=0, atol=0)

    expected.save_pretrained(tmp_path / "raw", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(logits(loaded_by_us(tmp_path / "raw")), logits(expected), **FLOAT32)


def test_corda_is_refused_by_name(tmp_path: Path) -> None:
    save_adapter(ours("gaussian"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config_in(tmp_path) | {"init_lora_weights": "corda"}))
    with pytest.raises(InputError, match=r"init_lora_weights='corda'.*convert it"):
        load_adapter(tiny_llama(), tmp_path)


# --- a training run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [*DERIVABLE, *LOST])
@pytest.mark.parametrize("nf4", [False, True])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, init: str, nf4: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the start is not found again to the last bit, or not at all: the checkpoint holds it."""

    def model(start: bool = True) -> nn.Module:
        base = tiny_base(nf4=nf4)
        add_adapter(base, LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=init))
        if init == "lora_ga" and start:
            lora_ga.initialize(base, [torch.arange(3, 43).reshape(2, 20)], forward=language_model_loss)
        return base

    def run(base: nn.Module, folder: str, **settings: Any) -> dict[str, torch.Tensor]:
        config = TrainConfig(
            output_dir=str(tmp_path / folder), batch_size=4, learning_rate=1e-2, save_every=2, **settings
        )
        train(base, PADDING, random_rows(16), config)
        return {key: value.clone() for key, value in base.state_dict().items() if "default" in key}

    straight = run(model(), "straight", max_steps=4)
    stopped = run(model(), "stopped", max_steps=4)
    assert all(torch.equal(stopped[key], value) for key, value in straight.items())

    (tmp_path / "half").mkdir()
    (tmp_path / "stopped" / "checkpoint-000002").rename(tmp_path / "half" / "checkpoint-000002")
    other = model(start=False)
    for each in adapters_named(other, "default").values():
        if each.start_A is not None:
            each.start_A.add_(1e-6)  # as an SVD of another library or number of threads may give
    resumed = run(other, "half", max_steps=4, resume="auto")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())
    again = tiny_base(nf4=nf4)
    load_adapter(again, tmp_path / "half" / "adapter")
    ids = torch.arange(3, 23)[None]
    bits = 2**-6 if nf4 else 1e-5  # bfloat16 products: some roundings of 2^-9 each
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids), other.eval()(ids), rtol=bits, atol=bits)
