"""Where A and B of a LoRA start: the registry of the values of `init_lora_weights`, and the plain ones.

Those that decompose the weight, or look at data, are in minilora/variants/.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minilora.adapters.layer_kinds import ConvKind, EmbeddingKind, LayerKind
from minilora.errors import InputError

Initialization = Callable[[Any, nn.Module], None]  # sets lora_A and lora_B of a LoRA, given the layer that it adapts
initializations: dict[str, Initialization] = {}
options_by_key: dict[str, type] = {}  # of initialisations, by the key of LoRAConfig that holds them


class Factors(Protocol):
    """What an initialisation sees of a LoRA."""

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    r: int
    lora_alpha: float
    scaling: float
    kind: LayerKind
    config: Any


def register_initialization(name: str, options: type | None = None) -> Callable[[Initialization], Initialization]:
    """Decorator: `init_lora_weights=name` calls this; the name is a regular expression: "pissa_niter_[0-9]+".

    options: a dataclass for what stands in `<name>_config` of LoRAConfig.
    """

    def remember(function: Initialization) -> Initialization:
        initializations[name] = function
        if options is not None:
            options_by_key[f"{name}_config"] = options
        return function

    return remember


def initialization(name: bool | str) -> Initialization | None:
    """The function for a value of init_lora_weights, or None where there is none."""
    if isinstance(name, bool):
        return kaiming if name else random_start
    return next((function for key, function in initializations.items() if re.fullmatch(key, str(name))), None)


@torch.no_grad()
def initialize(adapter: Factors, layer: nn.Module, path: str) -> None:
    """Set A and B as `init_lora_weights` says, given the layer that they adapt."""
    function = initialization(adapter.config.init_lora_weights)
    assert function is not None  # LoRAConfig has checked
    if isinstance(adapter.kind, EmbeddingKind) and function in (kaiming, gaussian):
        nn.init.zeros_(adapter.lora_A)  # a token's column of A is used for that token only; B is common to all
        nn.init.normal_(adapter.lora_B)
        return
    try:
        function(adapter, layer)
    except InputError as error:
        start = adapter.config.init_lora_weights
        raise InputError(f"{path or 'the layer'}: init_lora_weights={start!r} {error}") from None


def draw(kind: LayerKind, r: int) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of the shapes that a layer of this kind needs, drawn as PEFT does: same seed, same numbers."""
    if isinstance(kind, EmbeddingKind):
        return nn.Parameter(torch.randn(r, kind.in_features)), nn.Parameter(torch.randn(kind.out_features, r))
    # The layers are made for the numbers that their constructors draw, and dropped.
    if isinstance(kind, ConvKind):
        if r % kind.groups:
            raise InputError(f"r={r} cannot be divided among the groups={kind.groups} of a convolution")
        kernel = kind.shape[2:]
        Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
        A: nn.Module = Conv(kind.in_features, r, kernel, bias=False, dtype=torch.float32)  # type: ignore[arg-type]
        B: nn.Module = Conv(r, kind.out_features, 1, groups=kind.groups, bias=False, dtype=torch.float32)
    else:
        A = nn.Linear(kind.in_features, r, bias=False, dtype=torch.float32)
        B = nn.Linear(r, kind.out_features, bias=False, dtype=torch.float32)
    return A.get_parameter("weight"), B.get_parameter("weight")


def read_options(key: str, options: type, values: Any) -> Any:
    """The options that LoRAConfig holds under this key. Raises InputError for one that is unknown or out of range."""
    known = [field.name for field in fields(options)]
    if not isinstance(values, Mapping) or not set(values) <= set(known):
        raise InputError(f"LoRAConfig: {key} must be a dict with keys among {', '.join(known)}, not {values!r}")
    try:
        return options(**values)
    except InputError as error:
        raise InputError(f"LoRAConfig: {key}: {error}") from None
    except TypeError:  # a value that cannot be compared with the limits
        raise InputError(f"LoRAConfig: {key}: a value in {values!r} is of another type than it should be") from None


def require_linear(adapter: Factors, layer: nn.Module) -> None:
    """Raises InputError for an embedding or a convolution, which PEFT has no such initialisation for either."""
    if not adapter.kind.is_linear:
        raise InputError(f"needs a linear layer, not {type(layer).__name__}: exclude it, or initialize with True")


def weight_to_decompose(adapter: Factors, layer: nn.Module) -> Tensor:
    """W (out, in) of a linear layer in float32, dequantized, for an initialisation that decomposes it.

    Raises InputError where the layer, r, the scaling or W itself does not allow it.
    """
    require_linear(adapter, layer)
    W = adapter.kind.weight(layer).detach().float()
    if adapter.r > min(W.shape):
        raise InputError(f"needs r of at most {min(W.shape)}, the rank of its weight {tuple(W.shape)}, not {adapter.r}")
    if not adapter.scaling > 0:
        raise InputError(f"needs lora_alpha above 0, not {adapter.lora_alpha:g}")
    if W.is_meta:
        raise InputError("starts from the layer's weight, which is on the meta device: load the model's weights first")
    if not W.isfinite().all():
        raise InputError("starts from the layer's weight, which has NaN or infinity: the model is damaged")
    return W


def kaiming(adapter: Factors, layer: nn.Module) -> None:
    """A uniform in ±1/√in, B = 0: s·BA = 0, and training starts from the base model itself."""
    nn.init.kaiming_uniform_(adapter.lora_A, a=math.sqrt(5))
    nn.init.zeros_(adapter.lora_B)


def random_start(adapter: Factors, layer: nn.Module) -> None:
    """A and B as they were drawn, so that the update is not zero: for tests."""


@register_initialization("gaussian")
def gaussian(adapter: Factors, layer: nn.Module) -> None:
    """A ~ N(0, 1/r²), B = 0."""
    nn.init.normal_(adapter.lora_A, std=1 / adapter.r)
    nn.init.zeros_(adapter.lora_B)
