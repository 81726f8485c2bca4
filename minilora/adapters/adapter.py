"""What an adapter is: the configuration that all variants share, the contract that each fulfils, and the registry.

An adapter changes one layer, y = W x + b, into y = W' x + b. There are two ways to write one:

    additive          W' = W + ΔW.  Implement `delta` (what a merge adds to W); and `forward`, if ΔW x has a
                      cheaper form than multiplying by ΔW. LoRA: ΔW = s·BA, ΔW x = s·B(A x).
    anything else     Set `additive = False`; implement `transform` (W' x + b, given the layer below) and
                      `merged_weight` (W'). DoRA: W' = m (W + s·BA) / ‖W + s·BA‖.

`@register` makes it known: `add_adapter` builds the registered class that handles the given configuration.
`minilora.testing.check_variant` tries everything that a user of the variant will.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minilora.adapters.layer_kinds import LayerKind, kind_of
from minilora.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every variant's configuration has: which layers to adapt, and what else to train. PEFT's names."""

    peft_type: ClassVar[str] = ""  # PEFT's name of the method, written to adapter_config.json
    peft_lacks: ClassVar[frozenset[str]] = frozenset()  # keys that PEFT's configuration of this method does not have
    pattern_suffix: ClassVar[str] = ""  # what follows a layer's path in what rank_pattern matches

    target_modules: str | list[str] | None = None
    """"all-linear" (all but the output head), names or ends of names, or one regular expression for a whole name; where
    nothing is named, what is usual in the type of the model: adapters/default_targets.py"""
    exclude_modules: str | list[str] | None = None
    """layers to leave alone, written like target_modules"""
    layers_to_transform: int | list[int] | None = None
    """adapt only in blocks of these numbers what a name in target_modules is the end of"""
    layers_pattern: str | list[str] | None = None
    """the names that stand before a block's number, such as "layers", where it is not the first number in a path"""
    modules_to_save: list[str] | None = None
    """modules of which the adapter has a copy of its own, trained in full: ends of paths, and in PEFT's way of letters
    too: "norm" is the end of "input_layernorm", "model.norm" is not"""
    task_type: str | None = None
    """written to adapter_config.json for PEFT; as there, "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" save the new head"""
    base_model_name_or_path: str | None = None
    """written to adapter_config.json for PEFT"""

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), set | frozenset):  # as in PEFT; JSON has none
                object.__setattr__(self, field.name, sorted(value, key=str))
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            names = getattr(self, key)
            are_names = isinstance(names, str | list | tuple) and all(type(name) is str for name in names)
            self.require(key, names is None or are_names, "a string or a list of strings")
        if self.layers_pattern and self.layers_to_transform is None:
            raise InputError(
                "layers_pattern says where a block's number stands: give the numbers in layers_to_transform"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise InputError(
                f"layers_to_transform chooses among layers that are named: make target_modules={self.target_modules!r}"
                " a list of names, or write the blocks' numbers into the regular expression"
            )
        if isinstance(self.modules_to_save, str):
            raise InputError(f"modules_to_save must be a list of names, such as [{self.modules_to_save!r}]")

    def require(self, key: str, holds: bool, what: str) -> None:
        """Raise InputError, naming the key and its value, unless it is what it must be."""
        if not holds:
            raise InputError(f"{type(self).__name__}: {key} must be {what}, not {getattr(self, key)!r}")


def ends_with(pattern: str, path: str) -> bool:
    """True if the regular expression matches the path or its end after a dot: PEFT's rule for rank_pattern."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regular expression ({error})") from None


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where its dtype is narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Adapter(nn.Module):
    """One adapter of one layer, y = W x + b: the contract of every variant.

    Of the layer it keeps only the `kind`: how it multiplies, not its weight. Parameters are float32, whatever the
    model's dtype. Its guide is docs/write_your_own_variant.md.

    Args:
        layer: the layer to adapt.
        config: the configuration of the variant, a `config_class`.
        path: the layer's path in the model, for error messages.

    Raises:
        InputError: where the layer cannot take an adapter.
    """

    config_class: ClassVar[type[AdapterConfig]] = AdapterConfig
    additive: ClassVar[bool] = True  # y = W x + b + ΔW x, so that the updates of several adapters add up
    changes_weight: ClassVar[bool] = True  # W' is not W
    any_module: ClassVar[bool] = False  # it may sit on a module of no kind, whose `kind` is None then
    replaces: ClassVar[bool] = False  # y takes no account of W, so that two of them cannot act together
    peft_base: ClassVar[str] = "base_layer."  # what precedes the name of a parameter of the layer's own in PEFT's keys
    held_constant: ClassVar[tuple[str, ...]] = ()  # methods whose result takes no gradient, by design

    def __init__(self, layer: nn.Module, config: AdapterConfig, path: str = "") -> None:
        super().__init__()
        kind = kind_of(layer)
        if kind is None and not self.any_module:
            raise InputError(f"{path or 'the layer'} is a {type(layer).__name__}: it cannot take an adapter")
        self.kind: LayerKind = kind  # type: ignore[assignment]
        self.config: Any = config
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)  # see train_bias

    @classmethod
    def handles(cls, config: AdapterConfig) -> bool:
        """True if `add_adapter` should build this class for the configuration."""
        return type(config) is cls.config_class

    @classmethod
    def share(cls, config: Any, layers: Mapping[str, nn.Module]) -> Any:
        """What all adapters of this name on one model have in common, made once from the layers to adapt, by path."""
        return None

    @classmethod
    def build(cls, layer: nn.Module, config: Any, path: str, shared: Any) -> "Adapter":
        """The adapter of one layer; what `share` made, if anything, is the constructor's last argument."""
        return cls(layer, config, path, *([] if shared is None else [shared]))

    # --- what an additive variant implements

    def delta(self) -> Tensor:
        """What a merge adds to W: ΔW (out, in, *kernel), in float32 or better."""
        raise NotImplementedError

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """ΔW x (+ add), in the dtype of x (of ΔW for token ids). By default a product with all of ΔW."""
        delta = self.delta()
        y = self.kind.apply(x, delta.to(x.dtype) if x.is_floating_point() else delta)
        return y if add is None else add + y

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """A (r, in), B (out, r), s where forward now gives s·B(A x), to be computed together with W x; else None."""
        return None

    # --- what any other variant implements

    def transform(self, x: Tensor, below: "Below", add: Tensor | None = None) -> Tensor:
        """y = W' x + b (+ add), where `below` is the layer, or the layer with the adapters before this one."""
        return below(x, self(x, add))

    def merged_weight(self, W: Tensor) -> Tensor:
        """W' (out, in, *kernel) for the W of the layer below, in float32 or better."""
        return W + self.delta()

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """b' for the bias b of the layer below."""
        return bias

    def train_bias(self, layer: nn.Module) -> None:
        """Give the adapter a bias of its own, float32, that takes the place of the layer's wherever that is used."""
        bias = getattr(layer, "bias", None)
        if bias is not None:
            self.bias = nn.Parameter(at_least_float32(bias.detach()).clone())

    # --- what a variant may want

    def excludes(self, other: "Adapter") -> bool:
        """True if this one and another on the same layer cannot act together."""
        return self.replaces

    def base_for(self, layer: nn.Module) -> nn.Module:
        """The layer to put in the place of `layer`, under this adapter, when it is attached: by default the same."""
        return layer

    def check_before_training(self, name: str, total_steps: int) -> None:
        """Raise InputError where a run of so many steps would not train this adapter, called `name`, as it should."""

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """What it computes with and does not hold: parameters of another layer's adapter."""
        return []

    def regularization(self) -> Tensor | None:
        """A term that training adds to the loss, if any."""
        return None

    @classmethod
    def after_step(cls, adapters: Mapping[str, "Adapter"], step: int) -> None:
        """What training does after optimizer step `step`, from 1, with all adapters of a name and their gradients."""

    def peft_name(self, name: str) -> str:
        """The end of the key under which PEFT stores the parameter `name`."""
        return name

    def saved_tensors(self) -> dict[str, Tensor]:
        """What the adapter's file holds of this layer, by the end of PEFT's key; loading copies into these tensors."""
        return {
            "base_layer.bias" if name == "bias" else self.peft_name(name): parameter
            for name, parameter in self.named_parameters()
        }

    def shared_tensors(self) -> dict[str, Tensor]:
        """What `share` made and an adapter's file holds once, by the key in PEFT's file: base_model.<key>."""
        return {}

    @classmethod
    def peft_values(cls, values: dict[str, Any], adapters: Mapping[str, "Adapter"]) -> dict[str, Any]:
        """What adapter_config.json holds, given the configuration's values and the adapters by their layers' paths."""
        return values


class Below:
    """The layer under an adapter as that adapter sees it: the base layer, with the adapters before it applied."""

    def __init__(
        self, layer: nn.Module, base: Any, kind: LayerKind, adapters: list[Adapter], bias: Tensor | None
    ) -> None:
        self.layer, self._base, self._kind, self._adapters, self._bias = layer, base, kind, adapters, bias

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """W x + b (+ add)."""
        if not self._adapters:
            return self._base(x, add)
        below = Below(self.layer, self._base, self._kind, self._adapters[:-1], self._bias)
        return self._adapters[-1].transform(x, below, add)

    def weight(self) -> Tensor:
        """W (out, in, *kernel): dequantized and with what the adapters before have done to it; no gradient."""
        with torch.no_grad():
            return self.trained_weight()

    def trained_weight(self) -> Tensor:
        """The same with a gradient."""
        W = self._kind.weight(self.layer)
        for adapter in self._adapters:
            W = adapter.merged_weight(W)
        return W

    def bias(self) -> Tensor | None:
        """b, with what the adapters before have done to it."""
        bias = self._bias
        for adapter in self._adapters:
            bias = adapter.merged_bias(bias)
        return bias


# --- the registry ----------------------------------------------------------------------------------------------------

_variants: list[type[Adapter]] = []


def register(variant: type[Adapter]) -> type[Adapter]:
    """Class decorator: make `add_adapter` and `load_adapter` know this variant.

    A configuration of the same name is the same one, edited: the cell of a notebook, run again.

    Args:
        variant: the adapter's class.

    Returns:
        The class itself.

    Raises:
        InputError: where its configuration has no peft_type, or that of another one, which a file could not tell apart.
    """
    config = variant.config_class
    if not config.peft_type:
        raise InputError(
            f"{variant.__name__}: config_class must be a configuration with a peft_type, its name in files"
        )
    for other in (each.config_class for each in _variants):
        if other.peft_type == config.peft_type and other.__qualname__ != config.__qualname__:
            raise InputError(f"{config.__name__}: peft_type {config.peft_type!r} is {other.__name__}'s: choose another")
    _variants.append(variant)
    return variant


def adapter_class(config: AdapterConfig) -> type[Adapter]:
    """The variant for a configuration: of those that handle it, the one registered last."""
    for variant in reversed(_variants):
        if variant.handles(config):
            return variant
    raise InputError(f"no adapter is registered for a {type(config).__name__}; decorate its class with @register")


def config_class(peft_type: str) -> type[AdapterConfig]:
    """The configuration class for PEFT's name of a method."""
    classes = {variant.config_class.peft_type: variant.config_class for variant in _variants}
    if peft_type not in classes:
        raise InputError(f"peft_type is {peft_type!r}, which is not one of {sorted(classes)}")
    return classes[peft_type]
