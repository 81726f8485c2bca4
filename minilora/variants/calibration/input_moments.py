"""Second moments H = Σ x xᵀ of the inputs that layers see on batches of data."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters import evaluating
from minilora.errors import InputError
from minilora.progress import with_progress
from minilora.variants.calibration.batches import Forward, as_mapping


@torch.no_grad()
def input_moments(
    model: nn.Module, paths: Iterable[str], batches: Sequence[Any], forward: Forward
) -> dict[str, Tensor]:
    """H (in, in), float32, of each of these layers over all tokens of the batches; padding is left out.

    batches, forward: see variants/calibration/batches.py; the loss itself is not used. A token is padding where the
    batch's attention_mask is 0. Raises InputError naming a layer without inputs, or with some that are not finite.
    """
    layers = {path: model.get_submodule(path) for path in paths}
    moments: dict[str, Tensor] = {}
    real: list[Tensor | None] = [None]  # the mask of the batch at hand

    def look(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x, mask = args[0], real[0]
            x = x[mask.to(x.device)] if mask is not None and x.shape[:2] == mask.shape else x.flatten(0, -2)
            x = x.float()
            H = moments.setdefault(path, torch.zeros(x.shape[1], x.shape[1], device=x.device))
            H.addmm_(x.T, x)

        return hook

    hooks = [layer.register_forward_pre_hook(look(path)) for path, layer in layers.items()]
    try:
        with evaluating(model):
            for batch in with_progress(batches, len(batches), "Looking at inputs", "batches"):
                mask = as_mapping(batch).get("attention_mask")
                real[0] = None if mask is None else mask.bool()
                forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for path in layers:
        if path not in moments or moments[path].trace() == 0:
            raise InputError(f"{path}: no batch gave it an input, or only zeros; give more or other batches")
        if not moments[path].isfinite().all():
            raise InputError(f"{path}: its inputs have NaN or infinity; is an adapter or a layer before it damaged?")
    return moments
