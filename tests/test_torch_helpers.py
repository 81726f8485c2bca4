"""The randomized SVD."""

import pytest
import torch
from torch import Tensor

from minilora.torch_helpers import randomized_svd


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
