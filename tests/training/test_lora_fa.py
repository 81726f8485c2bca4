"""LoRA-FA: the projection against least squares in float64, the steps against PEFT's optimizer, and `train`."""

from pathlib import Path

import peft.optimizers.lorafa
import pytest
import torch
from helpers.adapters import IDS, peft_model, peft_parameters, randomize, tiny_llama
from helpers.training import random_rows, run, tiny_model, trained
from torch import nn

from minilora.adapters.attach import add_adapter
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError
from minilora.training.lora_fa import LoRAFA, projected

CONFIG = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "up_proj"]}


@pytest.mark.parametrize("layer", [nn.Linear(9, 7), nn.Conv2d(3, 7, 2)], ids=["linear", "conv"])
def test_the_projection_is_the_least_squares_fit_to_the_gradient_of_w(layer: nn.Module) -> None:
    torch.manual_seed(0)
    lora = LoRA(layer, LoRAConfig(r=4, lora_alpha=6)).double()
    g_W = torch.randn(7, lora.lora_A[0].numel(), dtype=torch.float64)
    A, s = lora.lora_A.detach().flatten(1), lora.scaling
    lora.lora_B.grad = (s * g_W @ A.T).view_as(lora.lora_B)
    # min over X of ‖X (s A) − g_W‖, by another solver
    expected = torch.linalg.lstsq((s * A).T, g_W.T).solution.T
    # the term 1e-8 beside A Aᵀ, whose eigenvalues are of the order of 0.1 to 1
    torch.testing.assert_close(projected(lora).flatten(1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_steps_are_those_of_peft(use_rslora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)  # it would round ĝ_B to 8 bits
    ours, theirs = tiny_llama(), peft_model(tiny_llama(), use_rslora=use_rslora, **CONFIG)
    add_adapter(ours, LoRAConfig(use_rslora=use_rslora, **CONFIG))
    randomize(ours)
    randomize(theirs)
    start = {name: parameter.clone() for name, parameter in adapter_parameters(ours).items()}
    # Its AdamW adds eps to √v before the correction for the start, torch's after: a small eps makes them one.
    their_optimizer = peft.optimizers.create_lorafa_optimizer(theirs, r=4, lora_alpha=12, lr=1e-2)
    their_optimizer.param_groups[0]["eps"] = 1e-12
    our_optimizer = LoRAFA(ours, lr=1e-2, eps=1e-12, weight_decay=0.0)
    for model, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
        for _ in range(5):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in adapter_parameters(ours).items():
        # five float32 steps, of 1e-2 each; a gradient near zero may turn the sign of Adam's first one
        torch.testing.assert_close(parameter, peft_parameters(theirs)[name], rtol=1e-4, atol=1e-4)
        assert torch.equal(parameter, start[name]) == name.endswith("lora_A")


def test_the_layer_keeps_r_numbers_a_token() -> None:
    layer = nn.Sequential(nn.Linear(256, 8, bias=False))
    add_adapter(layer, LoRAConfig(r=4, target_modules=["0"]))
    x = torch.randn(32, 256, requires_grad=True)

    def kept() -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x)
        return sum(sizes.values())

    with_x = kept()
    LoRAFA(layer, lr=1e-3)
    assert with_x - kept() >= x.numel(), "x itself is no longer kept"


def test_train_leaves_a_alone_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    rows, settings = random_rows(8), {"lora_fa": True, "batch_size": 4, "max_steps": 6, "save_every": 3}
    whole, again = tiny_model(), tiny_model()
    start = {name: p.clone() for name, p in adapter_parameters(whole).items()}
    result = run(whole, rows, tmp_path / "run", **settings)
    losses = [record["loss"] for record in result.history if "loss" in record]
    assert losses[-1] < losses[0]
    for name, parameter in adapter_parameters(whole).items():
        assert torch.equal(parameter, start[name]) == name.endswith("lora_A")
    run(again, rows, tmp_path / "run", **settings | {"resume": str(tmp_path / "run/checkpoint-000003")})
    assert all(torch.equal(a, b) for a, b in zip(trained(whole).values(), trained(again).values(), strict=True))


def test_an_embedding_is_refused() -> None:
    model = tiny_llama()
    add_adapter(model, LoRAConfig(target_modules=["embed_tokens"]))
    with pytest.raises(InputError, match="embed_tokens"):
        LoRAFA(model, lr=1e-3)
