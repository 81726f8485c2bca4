"""Loss scaling: gradients in float16 that neither underflow nor overflow (Micikevicius et al., arXiv 1710.03740, 3.2).

float16 has no number between 0 and 6e-8, and gradients of activations are often smaller. The backward pass is linear:

    ∂(k L)/∂p = k ∂L/∂p          k a power of two, so that multiplying and dividing rounds nothing

is computed from k L, and the float32 gradients of the parameters are divided by k before anything looks at them. With
a k too large they are infinite or NaN: k is halved and the same step is made again, so that no rows are lost. After
2000 steps without that it is doubled (`Progress.add_step`). bfloat16 and float32 have the exponents for k = 1.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from minilora.nf4 import NF4Linear
from minilora.training.checkpoint import Progress

FIRST_SCALE = 2.0**16


def needs_loss_scale(model: nn.Module) -> bool:
    """True if some of the model's products are in float16."""
    return any(
        (isinstance(module, NF4Linear) and module.compute_dtype == torch.float16)
        or any(parameter.dtype == torch.float16 for parameter in module.parameters(recurse=False))
        for module in model.modules()
    )


def overflowed(parameters: Collection[nn.Parameter], losses: list[Tensor], progress: Progress) -> bool:
    """Divide the gradients by the scale; where they have overflowed, drop them, halve the scale and say so.

    Not where a loss itself is infinite or NaN: no scale mends that.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if progress.loss_scale == 1 or not gradients:
        return False
    torch._foreach_mul_(gradients, 1 / progress.loss_scale)
    if all(gradient.isfinite().all() for gradient in gradients) or not torch.stack(losses).isfinite().all():
        return False
    progress.lower_loss_scale()
    for parameter in parameters:
        parameter.grad = None
    return True
