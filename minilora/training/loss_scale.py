"""Loss scaling: gradients in float16 that neither underflow nor overflow (Micikevicius et al., arXiv 1710.03740, 3.2).

float16 has no number between 0 and 6e-8, and gradients of activations are often smaller. The backward pass is linear:

    ∂(k L)/∂p = k ∂L/∂p          k a power of two, so that multiplying and dividing rounds nothing

is computed from k L, and the float32 gradients of the parameters are divided by k before anything looks at them. With
a k too large they are infinite or NaN: k is halved and the same step is made again, so that no rows are lost. After
GROWTH_INTERVAL steps without that it is doubled. bfloat16 and float32 have the exponents for k = 1.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minilora.nf4 import NF4Linear

__all__ = ["FIRST_SCALE", "GROWTH_INTERVAL", "gradients_are_finite", "needs_loss_scale", "unscale_"]

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # steps


def needs_loss_scale(model: nn.Module) -> bool:
    """True if some of the model's products are in float16."""
    return any(
        (module.compute_dtype if isinstance(module, NF4Linear) else None) == torch.float16
        or any(parameter.dtype == torch.float16 for parameter in module.parameters(recurse=False))
        for module in model.modules()
    )


def unscale_(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Divide the gradients by the scale, in place."""
    if scale != 1 and (gradients := _gradients(parameters)):
        torch._foreach_mul_(gradients, 1 / scale)


def gradients_are_finite(parameters: Iterable[nn.Parameter]) -> bool:
    return all(bool(gradient.isfinite().all()) for gradient in _gradients(parameters))


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
