"""Pearson's test of drawn tokens against the probabilities that they should have."""

import math
from collections import Counter

from torch import Tensor


def chi_square(counts: Counter[int], expected: Tensor, n: int) -> tuple[float, float]:
    """Pearson's statistic over the tokens expected at least five times (the others as one), and its bound.

    The bound is mean + 6 standard deviations of χ² (k and √2k for k degrees of freedom): beyond it lies less than
    one draw in 10⁵, and the seed is fixed.
    """
    often = [(counts[i], float(p) * n) for i, p in enumerate(expected) if p * n >= 5]
    rest = (n - sum(c for c, _ in often), n - sum(e for _, e in often))
    cells = [*often, rest] if rest[1] >= 5 else often
    k = len(cells) - 1
    assert k > 3, "a distribution with so few tokens would test little"
    return sum((c - e) ** 2 / e for c, e in cells), k + 6 * math.sqrt(2 * k)
