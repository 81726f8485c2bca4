"""Gradient checkpointing that tells its layers so."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from minilora.adapters.attach import add_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.gradient_checkpointing import checkpointed, inside_checkpoint
from minilora.models.shared_input import project, project_swiglu
from minilora.nf4 import dispatch, linear
from minilora.nf4.codec import dequantize
from minilora.nf4.linear import NF4Linear


class Block(nn.Module):
    """An MLP: two layers share their input, the last follows SwiGLU, whose output the backward pass does not need."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (NF4Linear.from_linear(nn.Linear(16, 24)) for _ in range(2))
        self.down = NF4Linear.from_linear(nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + project_swiglu(*project(x, self.gate, self.up), self.down)


def block(adapters: bool, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = Block()
    if adapters:
        add_adapter(made, LoRAConfig(r=4, target_modules=["gate", "up", "down"], init_lora_weights=False))
    return made


def gradients(blocks: list[nn.Module], x: Tensor, recompute: bool) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = leaf
    for each in blocks:
        y = checkpointed(each, y) if recompute else each(y)
    trained = [p for each in blocks for p in each.parameters() if p.requires_grad]
    return list(torch.autograd.grad(y.square().sum(), [leaf, *trained]))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("in_scratch", [False, True])
def test_how_often_a_weight_is_dequantized(adapters: bool, in_scratch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []

    def make(q: linear.QuantizedTensor, dtype: torch.dtype) -> Tensor:
        made.append(dequantize(q, dtype))
        return made[-1]

    blocks, x = [block(adapters, seed) for seed in range(2)], torch.randn(5, 16, dtype=torch.float64)
    for module in (dispatch, linear):
        monkeypatch.setattr(module, "temporary_weight", make)
    monkeypatch.setattr(dispatch, "_in_scratch_memory", lambda q: in_scratch)  # as on a CPU, and as elsewhere
    plain = gradients(blocks, x, recompute=False)
    assert len(made) == 2 * (3 + 3)  # two blocks of three layers: forward and backward
    made.clear()
    recomputed = gradients(blocks, x, recompute=True)
    # Forward, recomputation, backward: where memory lasts, the last two share one. What the last layer gives is not
    # needed: the checkpoint stops before its product.
    assert len(made) == 2 * (3 + 2 + 3 if in_scratch else 3 + 3)
    for a, b in zip(recomputed, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_weight_is_shared_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    true_weight = linear.temporary_weight
    for module in (dispatch, linear):
        monkeypatch.setattr(module, "temporary_weight", lambda *args: made.append(1) or true_weight(*args))
    blocks, x = [block(True, seed).cuda() for seed in range(2)], torch.randn(5, 16, device="cuda").bfloat16()
    plain, made[:] = gradients(blocks, x, recompute=False), []
    recomputed = gradients(blocks, x, recompute=True)
    assert len(made) == 2 * (3 + 3)
    for a, b in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_of_one_block_live_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0

    def make(q: linear.QuantizedTensor, dtype: torch.dtype) -> Tensor:
        nonlocal alive, most
        W = dequantize(q, dtype)
        alive += 1
        most = max(most, alive)

        def gone() -> None:
            nonlocal alive
            alive -= 1

        weakref.finalize(W.untyped_storage(), gone)
        return W

    blocks, x = [block(True, seed) for seed in range(4)], torch.randn(5, 16, dtype=torch.float64)
    for module in (dispatch, linear):
        monkeypatch.setattr(module, "temporary_weight", make)
    monkeypatch.setattr(dispatch, "_in_scratch_memory", lambda q: False)
    gradients(blocks, x, recompute=True)
    assert alive == 0
    assert most == 3  # the layers of a block


def test_it_is_told_only_inside() -> None:
    seen = []
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: seen.append(inside_checkpoint()))
    checkpointed(nn.Sequential(layer, nn.Tanh()), torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == [True, True]
    assert not inside_checkpoint()
    with pytest.raises(ZeroDivisionError):
        checkpointed(lambda x: x / (1 // 0), torch.randn(2, requires_grad=True))
    assert not inside_checkpoint()
