"""The largest singular values and vectors of a large matrix, from a few products with it.

    Y = M Ω             Ω (n, q) Gaussian: the columns of Y lie mostly along the largest singular vectors
    Y = (M Mᵀ)ⁿ Y       each iteration shrinks what lies along the others by (σ_other / σ)²
    Q = orth(Y)         (m, q)
    Qᵀ M = Ũ S Vᵀ       a small matrix, so this is cheap; then M ≈ (Q Ũ) S Vᵀ

M (m, n) costs 2·niter + 2 products with q columns, where a whole SVD costs min(m, n) of them many times over.

Halko, Martinsson, Tropp 2011, arXiv 0909.4061.
"""

import torch
from torch import Tensor


def randomized_svd(M: Tensor, q: int, niter: int, seed: int = 42) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and Vh (k, n) with M ≈ U diag(S) Vh, k = min(q, m, n); S falls.

    M (m, n) is float32 or float64. Ω comes from a generator of its own, drawn on the CPU: the same seed gives the same
    result, and no other random number of the program changes.
    The error is, up to a factor near 1, the error of the best rank q, and it gets there as (σ_{q+1}/σ_k)^{2·niter+1}
    falls. Source: arXiv 0909.4061, algorithms 4.4 and 5.1, corollary 10.10.
    """
    if M.shape[0] < M.shape[1]:  # the rows are the shorter side of what is decomposed below
        V, S, Uh = randomized_svd(M.T, q, niter, seed)
        return Uh.T, S, V.T
    random = torch.Generator().manual_seed(seed)
    Omega = torch.randn(M.shape[1], q, generator=random, dtype=M.dtype).to(M.device)
    Q = torch.linalg.qr(M @ Omega).Q
    for _ in range(niter):  # orthonormal again after every product, or all columns would turn to the first vector
        Q = torch.linalg.qr(M.T @ Q).Q
        Q = torch.linalg.qr(M @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
    return Q @ U, S, Vh
