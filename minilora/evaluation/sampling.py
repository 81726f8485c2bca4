"""Choosing the next token: the likeliest, or one drawn at a temperature, from the top k or the nucleus."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.devices import device_for_float64
from minilora.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, in transformers' terms; temperature 0 is greedy.

    `top_k` keeps the k likeliest tokens, `top_p` then the fewest that together have that probability (nucleus
    sampling, Holtzman et al., arXiv 1904.09751, section 3.1). The same `seed` draws the same tokens for a prompt
    whatever the batch size; None takes torch's global generator.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # NaN too
            raise InputError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be over 0 and at most 1, not {self.top_p}")


GREEDY = Sampling()


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Tensor:
    """One token a row from the logits (B, V): the likeliest, or the one at the quantile `uniform` (B,) float64.

    Inverse transform sampling: the first token at which the cumulative probability exceeds u ~ U[0, 1).
    Raises `InputError` where the logits are not finite.
    """
    best, token = logits.max(-1)  # NaN is larger than any number here
    if not bool(torch.isfinite(best).all()):
        raise InputError(
            "the model's logits are NaN or infinite: its weights or its adapter are damaged, "
            "or its dtype overflows; try dtype=torch.float32"
        )
    if uniform is None:
        return token
    where = device_for_float64(logits.device)
    cumulative = probabilities(logits, sampling).to(where).double().cumsum(-1)
    total = cumulative[:, -1:]
    # below the total, even where u is so close to 1 that the product rounds up to it
    quantile = torch.minimum(uniform.to(where)[:, None] * total, torch.nextafter(total, total - 1))
    return torch.searchsorted(cumulative, quantile, right=True)[:, 0].to(logits.device)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """softmax(logits / temperature) over what top_k and top_p leave: (B, V) float32, in transformers' order."""
    scores = logits.float()
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature  # no temperature makes it overflow
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        kth = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, index = scores.softmax(-1).sort(descending=True, stable=True)
        # a token stays if those likelier than it do not reach top_p yet; the likeliest always does
        removed = ordered.cumsum(-1) - ordered >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(removed).scatter(-1, index, removed), -torch.inf)
    return scores.softmax(-1)


def draw_uniforms(sampling: Sampling, rows: int, new_tokens: int) -> Tensor | None:
    """A number in [0, 1) for every row and step, drawn before the rows are put into batches; None for greedy."""
    if sampling.temperature == 0:
        return None
    generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
    return torch.rand(rows, new_tokens, dtype=torch.float64, generator=generator)
