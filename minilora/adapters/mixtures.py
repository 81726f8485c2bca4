"""How tensors are thinned out and added up when adapters are combined: task arithmetic, TIES, DARE, pruning."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def keep_all(x: Tensor, density: float) -> Tensor:
    return x


def keep_largest(x: Tensor, density: float) -> Tensor:
    """The share `density` of the numbers, those largest in magnitude; 0 for the rest.

    Source: TIES' trim, arXiv 2306.01708, algorithm 1.
    """
    kept = torch.zeros_like(x).flatten()
    kept[x.abs().flatten().topk(int(density * x.numel())).indices] = 1
    return x * kept.view_as(x)


def drop_at_random(x: Tensor, density: float) -> Tensor:
    """m ⊙ x / density with m ~ Bernoulli(density): fewer numbers, the same expectation.

    Source: DARE, arXiv 2311.03099, section 3 (there p = 1 − density is what is dropped).
    """
    return torch.bernoulli(torch.full_like(x, density)) * x / density


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], majority_sign_method: str) -> Tensor:
    """Σ wᵢ xᵢ: task arithmetic."""
    return torch.stack([w * x for w, x in zip(weights, tensors, strict=True)]).sum(0)


def mean_of_majority(tensors: Sequence[Tensor], weights: Sequence[float], majority_sign_method: str) -> Tensor:
    """At each place the mean of those wᵢxᵢ whose xᵢ has the sign γ that most of the mass, or most adapters, have.

    γ = sgn Σ xᵢ ("total"; "frequency": sgn Σ sgn xᵢ);  y = (Σ wᵢxᵢ over sgn xᵢ = γ) / how many they are.
    Source: TIES' elect and disjoint merge, arXiv 2306.01708, algorithm 1; as in PEFT the election is not weighted.
    """
    x = torch.stack(list(tensors))
    votes = x if majority_sign_method == "total" else x.sign()
    sign = torch.where(votes.sum(0) >= 0, 1, -1)
    agrees = x.sign() == sign
    weighted = torch.stack([w * x for w, x in zip(weights, tensors, strict=True)])
    return (agrees * weighted).sum(0) / agrees.sum(0).clamp(min=1)


Thin = Callable[[Tensor, float], Tensor]
Add = Callable[[Sequence[Tensor], Sequence[float], str], Tensor]

MIXTURES: dict[str, tuple[Thin, Add]] = {
    "linear": (keep_all, weighted_sum),
    "magnitude_prune": (keep_largest, weighted_sum),
    "dare_linear": (drop_at_random, weighted_sum),
    "ties": (keep_largest, mean_of_majority),
    "dare_ties": (drop_at_random, mean_of_majority),
}
