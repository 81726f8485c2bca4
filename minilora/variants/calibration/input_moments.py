"""Second moments H = Σ x xᵀ of the inputs that layers see on batches of data."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters import evaluating
from minilora.errors import InputError
from minilora.progress import with_progress
from minilora.variants.calibration.batches import Forward, attended_tokens, looking_at_inputs


@torch.no_grad()
def input_moments(
    model: nn.Module, paths: Iterable[str], batches: Sequence[Any], forward: Forward
) -> dict[str, Tensor]:
    """H (in, in), float32, of each of these layers over all tokens of the batches; padding is left out.

    batches, forward: see variants/calibration/batches.py; the loss itself is not used. A token is padding where the
    batch's attention_mask is 0. Raises InputError naming a layer without inputs, or with some that are not finite.
    """
    moments: dict[str, Tensor] = {}

    def add(path: str, x: Tensor) -> None:
        x = x.float()
        H = moments.setdefault(path, torch.zeros(x.shape[1], x.shape[1], device=x.device))
        H.addmm_(x.T, x)

    look = {path: partial(add, path) for path in paths}
    with evaluating(model):
        for batch in with_progress(batches, len(batches), "Looking at inputs", "batches"):
            with looking_at_inputs(model, look, attended_tokens(batch)):
                forward(model, batch)
    for path in look:
        if path not in moments or moments[path].trace() == 0:
            raise InputError(f"{path}: no batch gave it an input, or only zeros; give more or other batches")
        if not moments[path].isfinite().all():
            raise InputError(f"{path}: its inputs have NaN or infinity; is an adapter or a layer before it damaged?")
    return moments
