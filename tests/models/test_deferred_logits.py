"""Deferred logits: not computed without need, and what happens when an operation asks for them."""

import pytest
import torch
from torch import nn

from minilora.models.deferred_logits import DeferredLogits, deferring_logits


def head_and_hidden():
    torch.manual_seed(0)
    return nn.Linear(4, 7), torch.randn(2, 3, 4, requires_grad=True)


def test_what_is_only_handed_on_is_never_computed():
    head, hidden = head_and_hidden()
    with deferring_logits(head):
        output = {"logits": head(hidden)}
    logits = output["logits"]
    assert isinstance(logits, DeferredLogits) and logits.hidden is hidden and logits.computed is None
    assert "forward" not in vars(head) and type(head(hidden)) is torch.Tensor


OPERATIONS = {
    "scaled": lambda z: 2 * z,
    "capped": lambda z: torch.tanh(z / 3) * 3,
    "in place": lambda z: z.mul_(2),
    "in place, and the name kept": lambda z: (z.add_(1), z)[1],
    "some of them": lambda z: z[:, -1],
    "masked": lambda z: torch.where(torch.arange(7) < 5, z, -1.0),
    "cut": lambda z: z[..., :5].contiguous(),
    "among others": lambda z: torch.cat([z, z], dim=-1),
    "by a keyword": lambda z: torch.softmax(input=z, dim=-1),
    "a layer": lambda z: nn.functional.layer_norm(z, (7,)),
    "in float64": lambda z: z.double(),
    "by shape": lambda z: z.new_ones(z.shape) * z.sum(),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_any_operation_is_on_the_logits(operation):
    head, hidden = head_and_hidden()
    expected = operation(head(hidden))
    with deferring_logits(head):
        result = operation(head(hidden))
    assert torch.equal(result + 0, expected)  # + 0: what stands for them is a tensor once it is used
    for ours, theirs in zip(
        torch.autograd.grad(result.sum(), (hidden, head.weight)),
        torch.autograd.grad(expected.sum(), (hidden, head.weight)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_they_are_computed_once():
    head, hidden = head_and_hidden()
    with deferring_logits(head):
        logits = head(hidden)
    assert logits.shape == (2, 3, 7) and logits.requires_grad and logits.dtype == torch.float32
    computed = logits.computed
    logits.sum()
    assert logits.computed is computed


def test_the_head_is_put_back_after_an_error():
    head, hidden = head_and_hidden()
    with pytest.raises(ZeroDivisionError), deferring_logits(head):
        raise ZeroDivisionError
    assert type(head(hidden)) is torch.Tensor
