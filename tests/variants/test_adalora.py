"""AdaLoRA against PEFT: the update, the term in the loss, and who keeps which rank over a whole training."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import IDS, tiny_llama
from helpers.methods import Method, assert_near, assert_same, output, parameters, randomize
from helpers.training import random_rows, run, timeless_log, tiny_base
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minilora.adapters.attach import add_adapter
from minilora.adapters.for_training import after_step, regularization
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError
from minilora.formats.peft import load_adapter, save_adapter
from minilora.nf4.linear import NF4Linear
from minilora.variants.adalora import AdaLoRAConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]
SCHEDULE = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 12}


# without task_type, PEFT's model does not pass through the AdaLoRA part that adds to the loss
DEFAULTS = {"target_modules": TARGETS, "lora_alpha": 16, "task_type": "CAUSAL_LM", **SCHEDULE}
ADALORA = Method(AdaLoRAConfig, peft.AdaLoraConfig, **DEFAULTS)


@pytest.mark.parametrize("values", [{}, {"lora_alpha": 0}, {"init_lora_weights": False, "lora_alpha": 1}])
def test_equals_peft_on_a_llama(values: dict[str, Any]) -> None:
    ADALORA.check_equals_peft(**values)


def test_equals_peft_on_other_layers() -> None:
    torch.manual_seed(0)
    for layer, x in [
        (Conv1D(16, 12), torch.randn(3, 12)),
        (nn.Conv2d(4, 6, (3, 2), padding=1, stride=2), torch.randn(2, 4, 7, 7)),
    ]:
        ADALORA.check_equals_peft(nn.Sequential(layer), x, scale=1.0, target_modules=["0"], task_type=None)


def test_dropout_draws_the_same_masks_as_peft() -> None:
    for layer, x in [(nn.Linear(12, 16), torch.randn(20, 12)), (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 7))]:
        ADALORA.check_drops_as_peft(layer, x, task_type=None, lora_dropout=0.4)


def test_over_nf4() -> None:
    torch.manual_seed(0)
    ADALORA.check_adds_delta(NF4Linear.from_linear(nn.Linear(64, 16)), scale=1.0)


# --- the term in the loss --------------------------------------------------------------------------------------------


def test_the_term_in_the_loss_is_that_of_peft() -> None:
    ours, theirs = ADALORA.both(orth_reg_weight=0.3)
    randomize(ours, theirs)
    their_output = theirs(IDS, labels=IDS)
    loss = ours(IDS, labels=IDS).loss + regularization(ours)
    torch.testing.assert_close(loss, their_output.loss)
    assert regularization(ours) > 0
    for value in (loss, their_output.loss):
        value.backward()
    gradients = [{k: p.grad for k, p in parameters(model).items()} for model in (ours, theirs)]
    assert_same(*gradients, rtol=1e-4, atol=1e-6)  # a gradient near 0 is a difference of larger terms


def test_other_adapters_add_nothing_to_the_loss() -> None:
    model = tiny_llama()
    assert regularization(model) == 0.0
    add_adapter(model, LoRAConfig(target_modules=TARGETS))
    assert regularization(model) == 0.0
    after_step(model, 1)  # and do nothing after a step


# --- the ranks -------------------------------------------------------------------------------------------------------


def train_to(model: nn.Module, steps: range) -> list[dict[str, Tensor]]:
    """E of every layer after each step of a training with PEFT or minilora."""
    optimizer = torch.optim.AdamW(parameters(model).values(), lr=2e-2)
    history = []
    for step in steps:
        if isinstance(model, peft.PeftModel):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
        else:
            (model(IDS, labels=IDS).loss + regularization(model)).backward()
            optimizer.step()
            after_step(model, step)
        optimizer.zero_grad()
        history.append({k: p.detach().clone() for k, p in parameters(model).items()})
    return history


def live_triplets(history: list[dict[str, Tensor]]) -> list[int]:
    """How many of them E does not switch off, after each step."""
    return [sum(int(E.count_nonzero()) for k, E in step.items() if k.endswith("lora_E")) for step in history]


@pytest.mark.parametrize("values", [{}, {"deltaT": 4}, {"tfinal": 0, "tinit": 0, "beta1": 0.5, "beta2": 0.95}])
def test_the_allocation_over_a_whole_training_is_that_of_peft(values: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = (model.double() for model in ADALORA.both(**values))  # so that no tie is broken
    steps = range(1, SCHEDULE["total_step"] + 1)
    history = train_to(ours, steps)
    for mine, peft_s in zip(history, train_to(theirs, steps), strict=True):
        assert_same(mine, peft_s, rtol=1e-6, atol=1e-9)  # float64 in another order, through AdamW's divisions
    live = live_triplets(history)
    assert live[-1] == 6 * SCHEDULE["target_r"] < live[0]

    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert_same(*saved, rtol=1e-6, atol=1e-9)
    patterns = [
        json.loads((tmp_path / n / "adapter_config.json").read_text())["rank_pattern"] for n in ("ours", "theirs")
    ]
    assert patterns[0] == patterns[1]
    assert len({sum(kept) for kept in patterns[0].values()}) > 1, "some layers have kept more than others"


@pytest.mark.filterwarnings("error:Unexpected keyword")  # PEFT does not know a key in adapter_config.json
def test_folders_go_both_ways_before_and_after_the_allocation(tmp_path: Path) -> None:
    ADALORA.check_folders_both_ways(tmp_path / "before")
    ours, theirs = ADALORA.both(target_r=1, init_r=8)
    for model in (ours, theirs):
        train_to(model, range(1, 13))
    wanted = output(ours)
    assert_near(output(theirs), wanted, 1e-3)  # 12 steps of AdamW in float32
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ranks = [len(t) for k, t in load_file(tmp_path / "ours" / "adapter_model.safetensors").items() if "lora_E" in k]
    assert 0 in ranks, "a layer that has lost all its rank is a case of its own"
    assert_near(output(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()), wanted)
    load_adapter(again := tiny_llama(), tmp_path / "ours")
    assert_near(output(again), wanted)
    load_adapter(from_peft := tiny_llama(), tmp_path / "theirs")
    assert_near(output(from_peft), output(theirs))

    save_adapter(again, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_what_has_grown_again_since_the_last_allocation_is_saved_too(tmp_path: Path) -> None:
    """PEFT's file lacks it: between two allocations, what it saves is not what it has."""
    model, _ = ADALORA.both(deltaT=4)
    history = train_to(model, range(1, 6))
    assert live_triplets(history)[3] < live_triplets(history)[4] == 36
    save_adapter(model, tmp_path)
    load_adapter(again := tiny_llama(), tmp_path)
    assert_near(output(again), output(model))


def test_a_loaded_adapter_trains_on_with_the_ranks_it_has(tmp_path: Path) -> None:
    ours, _ = ADALORA.both()
    train_to(ours, range(1, 13))
    save_adapter(ours, tmp_path)
    load_adapter(again := tiny_llama(), tmp_path)
    after_step(again, 9)  # it has nothing to measure or to allocate
    live = live_triplets(train_to(again, range(1, 13)))
    assert live == [6 * SCHEDULE["target_r"]] * 12


def test_equal_ranks_at_start_and_end_take_nothing_away() -> None:
    ours, _ = ADALORA.both(init_r=3, target_r=3)
    assert live_triplets(train_to(ours, range(1, 13)))[-1] == 18


def test_a_loop_that_calls_it_wrongly_is_told_so() -> None:
    ours, _ = ADALORA.both()
    with pytest.raises(InputError, match=r"call after_step\(model, step\) before zero_grad"):
        after_step(ours, 1)
    with pytest.raises(InputError, match="no importance yet"):
        after_step(ours, 9)
    with pytest.raises(InputError, match="allocated no ranks yet"):
        after_step(ours, 10)


# --- in minilora.train -----------------------------------------------------------------------------------------------


def train_tiny(
    folder: Path, dropout: float = 0.1, weight: float = 0.5, **settings: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    model = tiny_base()
    schedule = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 2, "total_step": 10, "deltaT": 2}
    config = AdaLoRAConfig(target_modules="all-linear", lora_dropout=dropout, orth_reg_weight=weight, **schedule)
    add_adapter(model, config)
    defaults = {"max_steps": 10, "batch_size": 2, "gradient_accumulation_steps": 2, "save_every": 1, "keep_last": 20}
    run(model, random_rows(16), folder, **(defaults | settings))
    return model, {key: parameter.detach() for key, parameter in parameters(model).items()}


def test_train_brings_the_ranks_down(tmp_path: Path) -> None:
    model, values = train_tiny(tmp_path)
    assert live_triplets([values]) == [14 * 2]
    load_adapter(again := tiny_base(), tmp_path / "adapter")
    ids = torch.tensor([[1, 5, 9, 33]])
    assert_near(again.eval()(ids), model.eval()(ids))


def test_train_takes_the_term_into_the_loss(tmp_path: Path) -> None:
    distances = []
    for weight in (0.0, 0.5):
        _, values = train_tiny(tmp_path / str(weight), weight=weight)
        A = [value for key, value in values.items() if key.endswith("lora_A")]
        distances.append(sum(float((a @ a.T - torch.eye(4)).norm()) for a in A))
    assert distances[1] < 0.9 * distances[0], "10 steps have brought A Aᵀ nearer to I"


def test_the_term_counts_once_a_step_however_many_passes_it_has(tmp_path: Path) -> None:
    values = []
    for passes in (1, 4):
        split = {"batch_size": 4 // passes, "gradient_accumulation_steps": passes}
        values.append(train_tiny(tmp_path / str(passes), dropout=0.0, eps=1e-3, **split)[1])
    assert_same(*values, atol=1e-5)  # float32 sums in another order; eps keeps AdamW from dividing them by themselves


def test_fewer_steps_than_the_ranks_need_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="total_step=10, and this run has 9 steps"):
        train_tiny(tmp_path, max_steps=9)


@pytest.mark.parametrize("stop", [1, 5, 8])  # before the first allocation, between two, after the last
def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path: Path, stop: int) -> None:
    _, straight = train_tiny(tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    for step in range(stop + 1, 11):
        shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{step:06d}")
    _, resumed = train_tiny(tmp_path / "resumed", resume="auto")
    assert_same(resumed, straight)
    assert timeless_log(tmp_path / "resumed") == timeless_log(tmp_path / "straight")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        files = [(tmp_path / run_of / "adapter" / name).read_bytes() for run_of in ("straight", "resumed")]
        assert files[0] == files[1]


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"total_step": None}, "total_step must be the number of training steps"),
        ({"tinit": 9}, "tinit=9 and tfinal=3 leave none"),
        ({"tfinal": 12}, "leave none"),
        ({"target_r": 7}, "target_r must be at least 1 and at most init_r=6, not 7"),
        ({"target_r": 0}, "target_r"),
        ({"deltaT": 0}, "deltaT"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": 0.0}, "beta2"),
        ({"orth_reg_weight": -1}, "orth_reg_weight"),
        ({"use_dora": True}, "use_dora has no effect"),
        ({"use_rslora": True}, "use_rslora"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdaLoRAConfig(**(SCHEDULE | values))


def test_a_rank_that_is_not_used_is_warned_of_as_in_peft() -> None:
    for config_class in (AdaLoRAConfig, peft.AdaLoraConfig):
        with pytest.warns(UserWarning, match="init_r"):
            config_class(r=16, **SCHEDULE)


def test_layers_that_it_cannot_adapt_are_refused() -> None:
    ADALORA.check_refuses(nn.Embedding(4, 4), nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2))


def test_names_and_defaults_are_those_of_peft() -> None:
    ADALORA.check_names_and_defaults(total_step=10)


def test_a_copy_of_a_model_in_training_trains_on_alike() -> None:
    ours, _ = ADALORA.both()
    train_to(ours, range(1, 6))
    twin = copy.deepcopy(ours)
    assert_same(train_to(twin, range(6, 13))[-1], train_to(ours, range(6, 13))[-1])
