"""LoRA+: the groups and the steps of PEFT's create_loraplus_optimizer, in one's own loop and in `train`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import IDS, peft_model, tiny_llama
from helpers.training import random_rows, run, tiny_model, trained
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from minilora.adapters.attach import add_adapter
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError
from minilora.training.config import TrainConfig
from minilora.training.lora_plus import parameter_groups

CONFIG: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj", "embed_tokens"], "use_dora": True}


def both() -> tuple[nn.Module, nn.Module]:
    ours, theirs = tiny_llama(), peft_model(tiny_llama(), **CONFIG)
    add_adapter(ours, LoRAConfig(**CONFIG))
    randomize_alike(ours, theirs)
    return ours, theirs


def randomize_alike(ours: nn.Module, theirs: nn.Module) -> None:
    for number, (a, b) in enumerate(zip(ordered(ours), ordered(theirs), strict=True)):
        value = 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(number))
        a.data.copy_(value)
        b.data.copy_(value)


def ordered(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, in an order that does not depend on what either library calls them."""
    parameters = [(name.replace("lora_embedding", "lora"), p) for name, p in model.named_parameters()]
    named = [(name.removeprefix("base_model.model."), p) for name, p in parameters if p.requires_grad]
    return [p for _, p in sorted(named, key=lambda pair: pair[0].replace("adapters.default.", ""))]


def test_groups_and_steps_are_those_of_peft() -> None:
    ours, theirs = both()
    rates = {"lr": 1e-3, "weight_decay": 0.1}
    our_optimizer = torch.optim.AdamW(parameter_groups(ours, lr_ratio=16, lr_embedding=5e-3, **rates))
    their_optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=5e-3, loraplus_weight_decay=0.1
    )

    def rates_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[float, float]]:
        settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        return [settings[id(p)] for p in ordered(model)]

    assert rates_of(our_optimizer, ours) == rates_of(their_optimizer, theirs)
    assert len(set(rates_of(our_optimizer, ours))) == 3, "A, B, embeddings and what else there is have their own"

    for model, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
        for _ in range(5):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ordered(ours), ordered(theirs), strict=True):
        # AdamW divides by the size of the gradient: where that is ~1e-6, float32's rounding moves a step by 1e-3 of it
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_train_with_a_ratio_is_the_loop_with_the_groups(tmp_path: Path) -> None:
    rows = random_rows(4)
    settings = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0}
    plain, plus, by_hand = (tiny_model() for _ in range(3))
    run(plain, rows, tmp_path / "plain", **settings)
    run(plus, rows, tmp_path / "plus", loraplus_lr_ratio=8.0, **settings)

    ratios = []
    for name, parameter in adapter_parameters(plus).items():
        start, ordinary = adapter_parameters(by_hand)[name], adapter_parameters(plain)[name]
        # Adam's first step is its learning rate in every coordinate; over three steps the ratio stays near that
        ratios.append((name[-1], ((parameter - start).norm() / (ordinary - start).norm()).item()))
    assert all(5 < ratio < 11 for matrix, ratio in ratios if matrix == "B"), ratios
    assert all(0.5 < ratio < 2 for matrix, ratio in ratios if matrix == "A"), ratios


def test_a_resumed_run_keeps_the_ratio(tmp_path: Path) -> None:
    rows = random_rows(8)
    settings = {"loraplus_lr_ratio": 8.0, "batch_size": 4, "max_steps": 6, "save_every": 3}
    whole, halves = tiny_model(), tiny_model()
    run(whole, rows, tmp_path / "whole", **settings)
    run(halves, rows, tmp_path / "whole2", **settings)
    again = tiny_model()
    run(again, rows, tmp_path / "whole2", **settings | {"resume": str(tmp_path / "whole2/checkpoint-000003")})
    assert all(torch.equal(a, b) for a, b in zip(trained(whole).values(), trained(again).values(), strict=True))


@pytest.mark.parametrize("settings", [{"loraplus_lr_ratio": 0}, {"loraplus_lr_ratio": 16, "lora_fa": True}])
def test_settings_that_cannot_be_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="loraplus_lr_ratio"):
        TrainConfig(**settings)
