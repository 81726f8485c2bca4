"""The loss: cross-entropy at the labelled tokens, and nowhere else.

    position        0      1      2      3
    input_ids     <user>  hi   <asst>  hello  <eos>
    labels         -100  -100   -100   hello  <eos>
    logits needed                 ^      ^             position t predicts label t + 1

In instruction tuning most tokens carry no label, so the head (a fifth of a small model's work) runs on few positions.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.data import Batch, Example, collate
from minilora.model import Transformer

__all__ = ["held_out_loss", "label_tokens", "summed_cross_entropy", "summed_loss"]

# float32 values held at a time: on a CPU 4 MiB, so that a chunk stays in the cache; elsewhere 256 MiB, few launches
CHUNK_ELEMENTS = {"cpu": 2**20}
CHUNK_ELEMENTS_ELSEWHERE = 2**26


def label_tokens(examples: Sequence[Example]) -> int:
    """Count the labelled tokens that something predicts: all but a label on the very first token."""
    return sum(label != -100 for example in examples for label in example.labels[1:])


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of the cross-entropy (nats) over the batch's labelled tokens: a float32 scalar that has a gradient."""
    device = next(model.parameters()).device
    labels = batch.labels.to(device)
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != -100
    targets = labels[:, 1:][predicts[:, :-1]]
    input_ids, attention_mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    if isinstance(model, Transformer):
        logits = model(input_ids, attention_mask, logits_at=predicts)
    else:  # a transformers model, or one like it: it computes every position's logits
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[predicts]
    return summed_cross_entropy(logits, targets)


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: Sequence[Example], pad_token_id: int, batch_size: int = 8) -> float:
    """Mean cross-entropy (nats) of a labelled token over all the examples, dropout off, no gradient."""
    by_length = sorted(examples, key=lambda example: len(example.input_ids))  # little padding in a batch
    was_training = model.training
    model.eval()
    total = 0.0
    for i in range(0, len(by_length), batch_size):
        total += summed_loss(model, collate(by_length[i : i + batch_size], pad_token_id)).item()
    model.train(was_training)
    return total / label_tokens(examples)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ_i −log softmax(logits_i)[targets_i], summed in float32 (float64 for float64 logits).

    `logits` (n, V) of any floating dtype, `targets` (n,) int64; returns a scalar. No float32 copy of the logits is
    kept: both directions go through them a few rows at a time, and the gradient is rounded once, to the logits' dtype.
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits, targets)
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_z = torch.empty(len(logits), dtype=dtype, device=logits.device)
        for rows in _chunks(logits):
            log_z[rows] = logits[rows].to(dtype).logsumexp(-1)
        ctx.save_for_backward(logits, targets, log_z)
        # L = Σ_i (log Σ_v exp z_iv − z_i,target)
        return (log_z - logits.gather(1, targets[:, None])[:, 0].to(dtype)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_z = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _chunks(logits):
            # ∂L/∂z = softmax(z) − onehot(target)
            g = logits[rows].to(log_z.dtype, copy=True).sub_(log_z[rows, None]).exp_()
            g[torch.arange(len(g), device=g.device), targets[rows]] -= 1
            gradient[rows] = g.mul_(grad)
        return gradient, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    elements = CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    rows = max(1, elements // logits.shape[1])
    return (slice(i, i + rows) for i in range(0, len(logits), rows))
