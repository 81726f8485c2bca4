"""The loss: cross-entropy at the labelled tokens, and nowhere else; the logits of all positions never exist at once.

    position        0      1      2      3
    input_ids     <user>  hi   <asst>  hello  <eos>
    labels         -100  -100   -100   hello  <eos>
    logits needed                 ^      ^             position t predicts label t + 1

In instruction tuning most tokens carry no label, so the head (a fifth of a small model's work) runs on few positions.
And it runs on a few of these at a time: with a vocabulary of 49152, the logits of 2048 tokens would be 400 MB.

    z_i = head(h_i)                                    logits (V,) of one position, head(h) = W h as a rule
    L = Σ_i (log Σ_v exp z_iv − z_i,target)            cross-entropy
    ∂L/∂z_i = softmax(z_i) − onehot(target)            known as soon as z_i is, so that z_i can go
    ∂L/∂h_i = Wᵀ ∂L/∂z_i                               (hidden,): all that is saved for backward, ...
    ∂L/∂W = Σ_i ∂L/∂z_i h_iᵀ                           ... with this, if the head trains
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.adapters import Adapter, evaluating
from minilora.data import IGNORE, Batch, Example, PackedBatch, collate, pack
from minilora.errors import InputError
from minilora.models import Transformer
from minilora.progress import with_progress
from minilora.torch_helpers import is_plainly_called
from minilora.training.transformers_loss import hidden_and_head
from minilora.variants.calibration import as_mapping

# Positions through the head: enough for a matrix product's full speed. (On a core, with 2048 positions of 576 numbers
# and a vocabulary of 49152, in bfloat16: 0.70 of the time with all logits, with 128 positions at once 0.73, 512 0.81.)
ROWS_AT_ONCE = 256
# float32 values held at a time on a CPU: 4 MiB, so that they stay in the cache; elsewhere those of all the rows above
CACHE_ELEMENTS = 2**20


# --- of a batch -------------------------------------------------------------------------------------------------------


def label_tokens(examples: Sequence[Example]) -> int:
    """Count the labelled tokens that something predicts: all but a label on the very first token."""
    return sum(label != IGNORE for example in examples for label in example.labels[1:])


def summed_loss(model: nn.Module, batch: Batch | PackedBatch) -> Tensor:
    """Sum of the cross-entropy (nats) over the batch's labelled tokens: a float32 scalar that has a gradient.

    Raises InputError for a model that gives no logits.
    """
    device = next(model.parameters()).device
    labels = batch.labels.to(device)
    if not isinstance(model, Transformer):
        chosen, targets = _predicting(labels)
        hidden, head = hidden_and_head(model, batch, chosen)
        return linear_cross_entropy(hidden, head, targets)
    input_ids = batch.input_ids.to(device)
    if isinstance(batch, PackedBatch):
        return loss_of_labels(model, labels, input_ids=input_ids, lengths=batch.lengths)
    return loss_of_labels(model, labels, input_ids=input_ids, attention_mask=batch.attention_mask.to(device))


def loss_of_labels(model: Transformer, labels: Tensor, **inputs: Any) -> Tensor:
    """The same for labels (B, T) and the inputs of the model's forward pass, all on its device."""
    chosen, targets = _predicting(labels)
    compiled = model._compiled_call_impl is not None
    if type(model).forward is Transformer.forward and not compiled and is_plainly_called(model):
        return linear_cross_entropy(model(**inputs, logits_at=chosen, head=False), model.lm_head, targets)
    # More happens in a call of the model: a hook, what accelerate or a subclass has put there, a compiled graph.
    return summed_cross_entropy(model(**inputs, logits_at=chosen), targets)


def _predicting(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions whose next token has a label, as a bool mask (B, T), and these labels (n,)."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    chosen = following != IGNORE
    return chosen, following[chosen]


def language_model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of the labelled tokens of a batch: the loss that what looks at data takes by default.

    Args:
        model: minilora's `Transformer`, or a model of transformers, whose own loss it then is.
        batch: token ids (B, T), int64, each of which is a label too; or a mapping of tensors by name: `input_ids`
            (B, T) and, if there are any, `attention_mask` (B, T; 0 on padding), `labels` (B, T; -100 for none) and
            whatever else a model of transformers takes. Labels are not shifted: position t predicts label t + 1.

    Returns:
        A scalar in nats, float32, that has a gradient.

    Raises:
        InputError: the batch is of neither kind, or the model gives no loss.
    """
    values = as_mapping(batch)
    if "input_ids" not in values:
        raise InputError(
            "a batch must be token ids (B, T), or a mapping with input_ids; for any other, give"
            " forward=function(model, batch) that returns the loss"
        )
    device = next(model.parameters()).device
    values = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in values.items()}
    ids = values["input_ids"]
    mask = values.get("attention_mask", torch.ones_like(ids))
    labels = values.setdefault("labels", ids.masked_fill(mask == 0, IGNORE))
    if isinstance(model, Transformer):
        return summed_loss(model, Batch(ids, labels, mask)) / (labels[:, 1:] != IGNORE).sum()
    loss = getattr(model(**values), "loss", None)
    if loss is None:
        raise InputError(f"{type(model).__name__} returns no loss: give forward=function(model, batch) that does")
    return loss


@torch.no_grad()
def held_out_loss(
    model: nn.Module, examples: Sequence[Example], pad_token_id: int, batch_size: int = 8, packing: bool = False
) -> float:
    """Mean cross-entropy (nats) of a labelled token over all the examples, dropout off, no gradient.

    `packing` packs the rows of a transformers model; those of minilora's own always are.
    Raises InputError where no token has a label, and inside `adapters_for_rows`: the rows are taken by length.
    """
    n = label_tokens(examples)
    if n == 0:
        raise InputError("no row has a token that the loss could be taken of")
    by_length = sorted(examples, key=lambda example: len(example.input_ids))  # little padding in a batch, if any
    starts = range(0, len(by_length), batch_size)
    total = 0.0
    with evaluating(model):
        for i in with_progress(starts, len(starts), "held-out loss", "batches"):
            rows = by_length[i : i + batch_size]
            batch = pack(rows) if packing or isinstance(model, Transformer) else collate(rows, pad_token_id)
            total += summed_loss(model, batch).item()
    return total / n


# --- of hidden states and the head ------------------------------------------------------------------------------------


def linear_cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Σ_i −log softmax(head(hidden_i))[targets_i], in float32 (float64 for float64 logits), a few rows at a time.

    `hidden` (n, hidden) of any floating dtype, `targets` (n,) int64; `head` takes (rows, hidden) to (rows, V), each row
    by itself: a linear layer, tied or not, in 4 bits, with an adapter. Returns a scalar, whose gradient is computed
    along with it, for `hidden` and what trains in the head; ∂L/∂z is rounded once, to the logits' dtype.
    """
    adapters = [module for module in head.modules() if isinstance(module, Adapter)]
    parameters = [*head.parameters(), *(p for adapter in adapters for p in adapter.borrowed_parameters())]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # A hook may add to the graph, and counts on one backward: so then there is one call of the head, and one backward.
    if not all(map(is_plainly_called, head.modules())) or any(p._backward_hooks for p in trained):
        return summed_cross_entropy(head(hidden), targets)
    return _SummedLoss.apply(head, targets, torch.is_grad_enabled(), hidden, *trained)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The same of logits (n, V)."""
    return _SummedLoss.apply(nn.Identity(), targets, torch.is_grad_enabled(), logits)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, targets: Tensor, with_gradient: bool, hidden: Tensor, *trained: nn.Parameter
    ) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        d_hidden = torch.zeros_like(hidden) if with_gradient and ctx.needs_input_grad[3] else None
        d_trained: list[Tensor | None] = [None] * len(trained)
        has_gradient = not len(hidden)
        for rows in _chunks(len(hidden), ROWS_AT_ONCE):
            h = hidden[rows].detach().requires_grad_(d_hidden is not None)
            with torch.set_grad_enabled(with_gradient):
                logits = head(h)
            if not logits.requires_grad:
                loss += _cross_entropy(logits, targets[rows])
                continue
            has_gradient = True
            d_logits = torch.empty_like(logits)
            loss += _cross_entropy(logits.detach(), targets[rows], d_logits)
            inputs = trained if d_hidden is None else (*trained, h)
            gradients = list(torch.autograd.grad(logits, inputs, d_logits, allow_unused=True))
            if d_hidden is not None:
                d_hidden[rows] = gradients.pop()
            d_trained = [_added(total, gradient) for total, gradient in zip(d_trained, gradients, strict=True)]
        if not has_gradient:  # adapters that are switched off, on the head alone
            ctx.mark_non_differentiable(loss)
        ctx.save_for_backward(d_hidden, *d_trained)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(None if d is None else d * grad for d in ctx.saved_tensors)


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The sum, in float32 or better; autograd rounds it to the parameter's dtype."""
    if gradient is None:
        return total
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return gradient if total is None else total.add_(gradient)


def _cross_entropy(logits: Tensor, targets: Tensor, d_logits: Tensor | None = None) -> Tensor:
    """L of these rows; ∂L/∂z is written into `d_logits`, where given, in its dtype."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_zeros((), dtype=dtype)
    for rows in _chunks(len(logits), CACHE_ELEMENTS // logits.shape[1] if logits.is_cpu else ROWS_AT_ONCE):
        log_p = logits[rows].log_softmax(-1, dtype=dtype)
        loss -= log_p.gather(1, targets[rows, None]).sum()
        if d_logits is not None:
            p = log_p.exp_()
            p[torch.arange(len(p), device=p.device), targets[rows]] -= 1
            d_logits[rows] = p
    return loss


def _chunks(n: int, rows: int) -> Iterator[slice]:
    rows = max(1, rows)
    return (slice(i, i + rows) for i in range(0, n, rows))
