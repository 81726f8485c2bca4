"""Gradient checkpointing that tells its layers so, and the randomized SVD."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from minilora.adapters.attach import add_adapter
from minilora.adapters.lora import LoRAConfig
from minilora.models.shared_input import project, project_swiglu
from minilora.nf4 import dispatch, linear
from minilora.nf4.codec import dequantize
from minilora.nf4.linear import NF4Linear
from minilora.torch_helpers import checkpointed, inside_checkpoint, randomized_svd


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


def matrix(m: int, n: int, factor: float = 0.7) -> Tensor:
    """Singular values 1, factor, factor², … in float64."""
    random = torch.Generator().manual_seed(0)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=random, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=random, dtype=torch.float64)).Q
    return U * factor ** torch.arange(k) @ V.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (20, 20)])
@pytest.mark.parametrize("q", [1, 4, 25, 40])
def test_equal_to_torch_with_the_same_random_numbers(shape: tuple[int, int], q: int, dtype: torch.dtype) -> None:
    M = matrix(*shape).to(dtype)
    torch.manual_seed(7)
    U, S, V = torch.svd_lowrank(M, q=q, niter=2)
    for found, expected in zip(randomized_svd(M, q, 2, seed=7), (U, S, V.T), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("niter", [0, 1, 3])
def test_the_error_is_near_that_of_the_best_rank(shape: tuple[int, int], niter: int) -> None:
    """E |M − QQᵀM| ≤ (1 + …)^(1 / (2 niter + 1)) σ_{q+1} (corollary 10.10): the factor, 12 for q = 10 of 40 without
    oversampling, comes near 1 with the iterations."""
    M, q = matrix(*shape), 10
    U, S, Vh = randomized_svd(M, q, niter)
    best = torch.linalg.svdvals(M)[q]
    assert best <= torch.linalg.matrix_norm(M - U * S @ Vh, 2) * (1 + 1e-9) <= 12 ** (1 / (2 * niter + 1)) * best * 1.1
    for vectors in (U.T, Vh):
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(q, dtype=torch.float64))
    assert torch.equal(S, S.sort(descending=True).values)


def test_it_is_reproducible_and_leaves_the_program_s_random_numbers_alone() -> None:
    M = matrix(20, 30)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = randomized_svd(M, 4, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, randomized_svd(M, 4, 0), strict=True))
    assert not torch.equal(first[1], randomized_svd(M, 4, 0, seed=3)[1])
