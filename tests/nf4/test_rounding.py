"""Rounding that accounts for the inputs: against rounding to nearest, against brute force and against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora.nf4.codec import code, dequantize, dequantize_absmax, quantize
from minilora.nf4.linear import NF4Linear
from minilora.nf4.rounding import COLUMNS, absmax_of_weights, damped, descend, gptq, nearest, round_to_nf4


def inputs(n: int, features: int, rank: int, seed: int = 0) -> Tensor:
    """n inputs that lie near a few directions, as those of a language model do."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(rank, features, generator=generator)
    return torch.randn(n, rank, generator=generator) @ directions + 0.1 * torch.randn(n, features, generator=generator)


def weight(out: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed)) * 0.02


def cost(Q: Tensor, W: Tensor, H: Tensor) -> float:
    """tr(E H̃ Eᵀ) in float64."""
    E = Q.double() - W.double()
    return torch.einsum("oi,ij,oj->", E, damped(H.double()), E).item()


@settings(deadline=None, max_examples=25)
@given(
    out=st.integers(1, 9), features=st.integers(2, 2 * COLUMNS + 5), rank=st.integers(1, 6), seed=st.integers(0, 999)
)
def test_descent_never_raises_the_cost_and_stays_on_the_grid(out: int, features: int, rank: int, seed: int) -> None:
    W, X = weight(out, features, seed), inputs(50, features, rank, seed)
    H, grid = X.T @ X, quantize(weight(out, features, seed))
    c = absmax_of_weights(grid)
    start = nearest(W, c)
    Q = descend(start.T.contiguous(), W.T.contiguous(), c.T.contiguous(), damped(H)).T
    # float32 sums over at most 133 terms decide between codes whose costs are equal but for the last bits
    assert cost(Q, W, H) <= cost(start, W, H) * (1 + 1e-5)
    scaled = (Q / c).unsqueeze(-1)
    assert (scaled - code()).abs().amin(-1).max() < 1e-5  # w + (q − w) may differ from q by a float32 rounding


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (32, 192), (5, 77)])  # blocks within rows, and across them, the last short
def test_it_costs_a_fraction_of_rounding_to_nearest(shape: tuple[int, int], double_quant: bool) -> None:
    W, X = weight(*shape), inputs(400, shape[1], rank=6)
    H, grid = X.T @ X, quantize(W, double_quant=double_quant)
    rounded = round_to_nf4(W, grid, H)
    nearest_cost, ours = cost(dequantize(grid), W, H), cost(dequantize(rounded), W, H)
    # Six directions of 64 and more are to be kept right, so that most of the cost can go; by half leaves a margin.
    assert ours < 0.5 * nearest_cost
    assert torch.equal(dequantize_absmax(rounded), dequantize_absmax(grid))
    again = inputs(400, shape[1], rank=6)
    before, after = (((dequantize(q) - W) @ again.T).norm() for q in (grid, rounded))
    assert after < before


def test_a_change_too_small_for_nearest_rounding_arrives_in_the_output() -> None:
    """The case of merging: W lies on the grid, and the change is 2% of it."""
    grid = quantize(weight(96, 256))
    W = dequantize(grid)
    change = torch.randn(96, 4) @ torch.randn(4, 256)
    change *= 4e-4 / change.square().mean().sqrt()
    X = inputs(600, 256, rank=8)
    wanted = X @ change.T

    def error(Q: Tensor) -> float:
        return ((X @ (Q - W).T - wanted).norm() / wanted.norm()).item()

    assert error(dequantize(quantize(W + change))) > 0.8, "requantizing changes next to nothing, at 1 nothing at all"
    assert error(dequantize(round_to_nf4(W + change, grid, X.T @ X))) < 0.4


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    W = weight(40, 64)
    grid = quantize(W)
    rounded = round_to_nf4(W, grid, torch.eye(64) * 3)
    to_nearest = nearest(W, absmax_of_weights(grid))  # the quantizer divides by the absmax before it is in 8 bits
    assert torch.equal(dequantize(rounded), to_nearest)


def test_gptq_is_optimal_brain_quantization_in_this_order() -> None:
    """OBQ with the inverse taken anew for each input, in float64: the definition, where GPTQ has a factorization."""
    W, X = weight(7, COLUMNS + 9).double(), inputs(300, COLUMNS + 9, rank=5).double()
    H, c = damped(X.T @ X), absmax_of_weights(quantize(W.float())).double()
    w, q = W.clone(), torch.empty_like(W)
    for j in range(w.shape[1]):
        q[:, j] = nearest(w[:, j].float(), c[:, j].float())
        inverse = torch.linalg.inv(H[j:, j:])
        w[:, j:] -= ((w[:, j] - q[:, j]) / inverse[0, 0]).outer(inverse[0])
    ours = gptq(W.T.float().contiguous(), c.T.float().contiguous(), H.float()).T.double()
    # float32 may round the first weight that lies at a midpoint otherwise, after which its row goes another way
    same_rows = (ours - q).abs().amax(1) < 1e-6
    assert same_rows.sum() >= 6
    assert cost(ours, W, X.T @ X) == pytest.approx(cost(q, W, X.T @ X), rel=0.02)


def test_brute_force_finds_little_better() -> None:
    """Four outputs of five inputs each, all 16⁵ roundings of every one."""
    W, X = weight(4, 5), inputs(100, 5, rank=2)
    H, grid = X.T @ X, quantize(W, double_quant=False)
    every = torch.cartesian_prod(*[code()] * 5)
    best = sum(
        torch.einsum("ni,ij,nj->n", e, damped(H), e).min().item()
        for e in (every * c - w for w, c in zip(W, absmax_of_weights(grid), strict=True))
    )
    ours, to_nearest = (cost(dequantize(q), W, H) for q in (round_to_nf4(W, grid, H), grid))
    assert best <= ours * (1 + 1e-4)  # the search is in float32
    assert ours - best < 0.5 * (to_nearest - best), "more than half of what there is to gain"


def test_blocks_of_zeros_stay_zero() -> None:
    W = weight(4, 64)
    W[1] = 0
    grid, X = quantize(W, double_quant=False), inputs(100, 64, rank=3)
    assert not dequantize(round_to_nf4(W, grid, X.T @ X))[1].abs().max() > 1e-30
    rounded = dequantize(round_to_nf4(W, quantize(W), X.T @ X))
    assert rounded.isfinite().all()


@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_reads_the_result(double_quant: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    W, X = weight(96, 128), inputs(300, 128, rank=6)
    q = round_to_nf4(W, quantize(W, double_quant=double_quant), X.T @ X)
    nested = None
    if q.nested_absmax is not None:
        table = bitsandbytes.functional.create_dynamic_map()
        nested = bitsandbytes.functional.QuantState(q.nested_absmax, blocksize=256, code=table, dtype=torch.float32)
    state = bitsandbytes.functional.QuantState(
        q.absmax, shape=torch.Size(q.shape), code=code(), blocksize=64, quant_type="nf4", dtype=torch.float32,
        offset=q.offset, state2=nested,
    )  # fmt: skip
    theirs = bitsandbytes.nn.Linear4bit(128, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    theirs.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        q.codes.view(-1, 1), state.as_dict(packed=True), device="cpu"
    )
    expected = NF4Linear.from_quantized(q)(X)
    torch.testing.assert_close(theirs(X), expected, rtol=1e-5, atol=1e-6)  # float32 sums in another order
