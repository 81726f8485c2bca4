"""What several rooms need of torch: outputs of functions, autocast, plain calls, low rank."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

HOOKS_OF_ALL_MODULES = (
    of_all_modules._global_forward_hooks,
    of_all_modules._global_forward_pre_hooks,
    of_all_modules._global_backward_hooks,
    of_all_modules._global_backward_pre_hooks,
)


# --- functions --------------------------------------------------------------------------------------------------------


def as_output(y: Tensor) -> Tensor:
    """y; in torch.compile as a view, since torch 2.11 loses the gradients of an output that an earlier step made too.

    So it is after an operation in place, or a `.to` that had nothing to change.
    """
    return y.view_as(y) if torch.compiler.is_compiling() else y


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside the `with`, products are in the dtype of their factors.

    For a ΔW that is to be float32; and because autocast caches its cast of a parameter, without a gradient if under
    no_grad: PyTorch 2.6 would find no gradient for that parameter afterwards.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


# --- modules ---------------------------------------------------------------------------------------------------------


def is_plainly_called(module: nn.Module) -> bool:
    """True if a call of the module does what its class's forward does, and nothing else."""
    return (
        not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and not _hooks_of_all_modules()
        and "forward" not in module.__dict__  # accelerate sets one there, which fetches the weight first
    )


@torch.compiler.assume_constant_result
def _hooks_of_all_modules() -> bool:
    """Whether there are global module hooks, such as FlopCounterMode's; a constant in a compiled graph."""
    return any(HOOKS_OF_ALL_MODULES)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside the `with` the model is in training mode or not; afterwards each module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


# --- low rank ---------------------------------------------------------------------------------------------------------


def randomized_svd(M: Tensor, q: int, niter: int, seed: int = 42) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and Vh (k, n) with M ≈ U diag(S) Vh, k = min(q, m, n); S falls: `torch.svd_lowrank`, repeatable.

    The same seed gives the same result, and no other random number of the program changes.
    Source: Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    with torch.random.fork_rng([M.device] if M.is_cuda else []):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(M, q=q, niter=niter)
    return U, S, V.mH
