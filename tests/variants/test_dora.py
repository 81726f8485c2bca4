"""DoRA against PEFT and against its equations, on every kind of layer PEFT has it for."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import logits, tiny_llama
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minilora.adapters import merge
from minilora.adapters.attach import add_adapter
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.formats.peft import load_adapter, save_adapter
from minilora.nf4.linear import NF4Linear

# float32: sums of at most 64 products in another order, a norm over as many, and their quotient
FLOAT32 = {"rtol": 2e-5, "atol": 1e-5}


class Net(nn.Module):
    """One layer of every kind that PEFT has DoRA for."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.c1d = nn.Embedding(11, 16), nn.Linear(16, 12), Conv1D(10, 12)
        self.plain = nn.Linear(10, 10, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(10, 8, 3, padding=1, stride=2), nn.Conv2d(8, 6, 2, bias=False)
        self.conv3 = nn.Conv3d(6, 4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv1(self.plain(self.c1d(self.lin(self.emb(ids)).tanh()).tanh()).transpose(1, 2)).tanh()
        h = self.conv2(h.unsqueeze(-1).expand(-1, -1, -1, 3)).tanh()
        return self.conv3(h.unsqueeze(-1))


LAYERS = ["emb", "lin", "c1d", "plain", "conv1", "conv2", "conv3"]
X = torch.arange(14).reshape(2, 7) % 11


def both() -> tuple[nn.Module, nn.Module]:
    """Ours and PEFT's, with the same random A, B and m."""
    torch.manual_seed(0)
    base = Net()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, use_dora=True)
    )
    ours = copy.deepcopy(base)
    add_adapter(ours, LoRAConfig(r=4, lora_alpha=6, target_modules=LAYERS, use_dora=True))
    for (_, a), (_, b) in pairs(ours, theirs):
        a.data.copy_(a + 0.2 * torch.randn_like(a))
        b.data.copy_(a.view_as(b))
    return ours, theirs


def pairs(ours: nn.Module, theirs: nn.Module) -> list[Any]:
    def key(name: str) -> str:
        for part in ("base_model.model.", "adapters.default.", ".default", ".weight", "embedding_"):
            name = name.replace(part, "")
        return name

    found = [sorted((key(n), p) for n, p in m.named_parameters() if "lora_" in n) for m in (ours, theirs)]
    assert [n for n, _ in found[0]] == [n for n, _ in found[1]]
    return list(zip(*found, strict=True))


def test_forward_gradients_and_five_steps_are_those_of_peft() -> None:
    ours, theirs = both()
    torch.testing.assert_close(ours(X), theirs(X), **FLOAT32)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (ours, theirs)]
    for _ in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(X).square().mean().backward()
        for (name, a), (_, b) in pairs(ours, theirs):
            assert a.grad is not None, name
            torch.testing.assert_close(a.grad, b.grad.view_as(a), **FLOAT32, msg=lambda m, n=name: f"{n}: {m}")
        for optimizer in optimizers:
            optimizer.step()
    for (_, a), (_, b) in pairs(ours, theirs):
        torch.testing.assert_close(a, b.view_as(a), **FLOAT32)


def test_merge_is_forward_and_both_are_the_equation() -> None:
    ours, _ = both()
    layer = ours.lin
    dora = layer.adapters["default"]
    V = layer.base_layer.weight.double() + 6 / 4 * dora.lora_B.double() @ dora.lora_A.double()
    W = dora.lora_magnitude_vector.double()[:, None] * V / V.norm(dim=1, keepdim=True)  # equation 5
    x = torch.randn(3, 16)
    expected = (x.double() @ W.T + layer.base_layer.bias).float()
    torch.testing.assert_close(layer(x), expected, **FLOAT32)
    y = ours(X)
    merge(ours)
    torch.testing.assert_close(layer(x), expected, **FLOAT32)
    torch.testing.assert_close(ours(X), y, **FLOAT32)


def test_the_norm_is_held_constant_in_the_backward_pass() -> None:
    """Section 4.3: ‖V‖ takes no gradient, so that dA and dB are those of a plain LoRA times m / ‖V‖."""
    ours, _ = both()
    layer, dora = ours.plain, ours.plain.adapters["default"]
    x, grad = torch.randn(5, 10), torch.randn(5, 10)
    layer(x).backward(grad)
    V = layer.base_layer.weight + dora.delta()
    g = grad * (dora.lora_magnitude_vector / V.norm(dim=1)).detach()
    torch.testing.assert_close(dora.lora_B.grad, dora.scaling * g.T @ (x @ dora.lora_A.T), **FLOAT32)
    torch.testing.assert_close(dora.lora_A.grad, dora.scaling * (g @ dora.lora_B).T @ x, **FLOAT32)


@pytest.mark.parametrize("layer", ["lin", "conv1"])
def test_an_output_whose_weights_are_zero_stays_zero(layer: str) -> None:
    """As pruning leaves some: the equation has 0/0 there."""
    torch.manual_seed(0)
    model = Net()
    getattr(model, layer).weight.data[3] = 0
    before = model(X)
    add_adapter(model, LoRAConfig(r=4, target_modules=[layer], use_dora=True))
    torch.testing.assert_close(model(X), before, **FLOAT32)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter_parameters(model).values())
    merge(model)
    torch.testing.assert_close(model(X), before, **FLOAT32)


def test_on_a_4_bit_base_it_is_dora_on_the_dequantized_weight() -> None:
    torch.manual_seed(0)
    packed = NF4Linear.from_linear(nn.Linear(64, 48))
    dense = nn.Linear(64, 48)
    dense.load_state_dict({"weight": packed.dequantize(), "bias": packed.bias})
    models = [nn.Sequential(layer) for layer in (packed, dense)]
    for model in models:
        add_adapter(model, LoRAConfig(target_modules=["0"], use_dora=True))
    for a, b in zip(adapter_parameters(models[0]).values(), adapter_parameters(models[1]).values(), strict=True):
        b.data.copy_(a.data.add_(0.1 * torch.randn_like(a)))
    x = torch.randn(5, 64)
    torch.testing.assert_close(models[0](x), models[1](x), **FLOAT32)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 3}}])
def test_folders_go_both_ways(config: dict[str, Any], tmp_path: Path) -> None:
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True} | config
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_llama()
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), **FLOAT32)

    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(theirs), **FLOAT32)
    assert not torch.allclose(logits(tiny_llama()), logits(ours), atol=1e-2), "or the adapter does nothing"
