"""Principal components of rows that come batch by batch, in the memory of one batch and the components.

The rows seen so far stand as S·V: their largest singular values and right vectors, about their mean. A batch X of n
rows with mean m joins n₀ rows with mean m₀ as

    U S' V'ᵀ = SVD of [ S V ;  X − m ;  √(n₀ n / (n₀ + n)) (m₀ − m) ]

Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", section 2.1. Numbers as PEFT's, which decomposes
with a randomized SVD of twice the wanted components and the seed 42, the first batch in float32 and later ones in
float64.
"""

import torch
from torch import Tensor

from minilora.devices import device_for_float64
from minilora.torch_helpers import randomized_svd


class IncrementalPCA:
    """The first `k` principal components of all rows given to `update`.

    n: the rows seen. components: (k, features), orthonormal rows, each with its largest number positive.
    singular_values: (k,), falling. explained: (k,), each component's share of the rows' whole variance.
    """

    def __init__(self, k: int) -> None:
        self.k, self.n = k, 0
        self.components = self.singular_values = self.explained = torch.empty(0)
        self._mean = self._scatter = torch.zeros((), dtype=torch.float64)

    def update(self, X: Tensor) -> None:
        """Take in the rows of X (n, features), n ≥ k, float32."""
        X = X.to(device_for_float64(X.device))
        n0, n, mean = self.n, len(X), X.mean(0, dtype=torch.float64)
        rows = X - mean.to(X.dtype)
        # Σ |x − mean|² over all rows seen: the whole of which each component explains a share
        scatter = rows.double().square().sum()
        if n0:
            shift = (n0 * n / (n0 + n)) ** 0.5 * (self._mean - mean)
            scatter += self._scatter + shift.square().sum()
            mean = (n0 * self._mean + n * mean) / (n0 + n)
            rows = torch.cat([self.singular_values[:, None] * self.components, rows, shift[None]])  # float64 by now
        self.n, self._mean, self._scatter = n0 + n, mean, scatter

        _, S, Vh = randomized_svd(rows, q=2 * self.k, niter=4)
        largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
        self.components, self.singular_values = (Vh * largest.sign())[: self.k], S[: self.k]
        self.explained = self.singular_values.square() / scatter.clamp(min=1e-30)  # rows that do not vary at all
