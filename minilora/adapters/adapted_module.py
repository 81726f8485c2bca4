"""Any module with adapters on it that is not one of the layers that an update is made for.

A LayerNorm whose bias an adapter trains, experts that are one tensor, a whole block of which an adapter has a copy: the
module is called with other parameters in the place of its own, which stay what they are.
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minilora.adapters.adapter import Adapter
from minilora.adapters.layer import AdaptedLayer, LoRALinear
from minilora.adapters.layer_kinds import kind_of
from minilora.errors import InputError
from minilora.nf4 import NF4Linear


class AdaptedModule(AdaptedLayer):
    """Any other module; of it an adapter has a bias or updates of its own, or a copy, see adapters/trained_parts.py."""

    any_module = True

    def changes_weight(self) -> bool:
        return False  # there is no one W

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives, with the acting adapters' copy or parameters in the place of its own."""
        if self.row_names is not None and self.enabled:
            if len(args) != 1 or kwargs:
                raise InputError(
                    f"{self.row_names.path(self)} takes more than one input: no mixed batch can go through it"
                )
            return self.row_by_row(args[0], self.row_names.rows(args[0], self))
        return self._call(self.acting_adapters(), *args, **kwargs)

    def _call(self, adapters: list[Adapter], *args: Any, **kwargs: Any) -> Any:
        module = self.layer_in_use()
        if not adapters:
            return module(*args, **kwargs)
        if adapters[0].replaces:
            return cast(Any, adapters[0]).call(module, *args, **kwargs)
        values = self._values(adapters)
        return functional_call(module, {k: v.to(module._parameters[k].dtype) for k, v in values.items()}, args, kwargs)

    def _values(self, adapters: list[Adapter]) -> dict[str, Tensor]:
        """What takes the place of the module's own parameters: the adapters' bias, and W + Σ ΔW, in float32."""
        own = self.base_layer._parameters
        bias = self.own_bias(adapters)
        values = {} if bias is None else {"bias": bias}
        for adapter in adapters:
            for name, update in cast(Any, adapter).updates().items():
                values[name] = values.get(name, own[name]) + update
        return values

    def row_by_row(self, x: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Each row of x (rows, …) with the copy or the bias of its own adapter; the module takes x alone."""
        acting = {name: [cast(Adapter, self.adapters[name])] if name in self.adapters else [] for name in rows}
        parts = [(self._call(acting[name], x.index_select(0, i)), i) for name, i in rows.items()]
        if not all(isinstance(part, Tensor) for part, _ in parts):
            raise InputError(
                f"a {type(self.base_layer).__name__} gives more than one tensor: no mixed batch goes through"
            )
        y: Tensor = parts[0][0].new_empty(len(x), *parts[0][0].shape[1:])
        for part, i in parts:
            y = y.index_copy(0, i, part)
        return y

    def can_be_read(self, name: str) -> bool:
        base = self.base_layer
        return name in base._parameters or name in base._buffers or name in base._modules

    def read(self, name: str, adapters: list[Adapter]) -> Any:
        """The copy's part, or the parameter with what the adapters make of it, in the dtype of the module's own."""
        own = getattr(self.base_layer, name)
        if adapters[0].replaces:
            value = getattr(cast(Any, adapters[0]).module, name)
        else:
            value = self._values(adapters).get(name, own)
        return value.to(own.dtype) if isinstance(own, nn.Parameter) else value

    @torch.no_grad()
    def merge(self, name: str = "the module", safe: bool = True) -> None:
        """Swap base_layer for the acting adapter's copy, or for itself with the adapters' bias, in its dtype."""
        adapters = self.active_adapters()
        if self.merged or not adapters:
            return
        merged, base = copy.deepcopy(self.folded()).requires_grad_(False), self.base_layer
        dtypes = parameter_dtypes(base)
        for key, parameter in merged.named_parameters():
            parameter.data = parameter.data.to(dtypes[key])
        if safe and not all(parameter.isfinite().all() for parameter in merged.parameters()):
            raise InputError(f"{name}: merging {self.active} gives NaN or infinity; nothing was merged")
        self.put_in_place(merged)

    def folded(self) -> nn.Module:
        """A module that computes what the active adapters make of this one, in float32; it shares their memory."""
        base, adapters = self.base_layer, self.active_adapters()
        if adapters[0].replaces:
            return cast(nn.Module, adapters[0].module)
        module = copy.copy(base)
        values = {name: nn.Parameter(v.detach(), requires_grad=False) for name, v in self._values(adapters).items()}
        module._parameters = base._parameters | values
        return module


def parameter_dtypes(module: nn.Module, in_4_bits: torch.dtype | None = None) -> dict[str, torch.dtype]:
    """The dtype in which each parameter is used, by path; of NF4Linears `in_4_bits`, by default their compute dtype."""
    dtypes = {key: parameter.dtype for key, parameter in module.named_parameters()}
    for path, layer in module.named_modules():
        if isinstance(layer, NF4Linear):
            dtype = in_4_bits or layer.compute_dtype or torch.float32
            dtypes |= {f"{path}.{name}".lstrip("."): dtype for name in ("weight", "bias")}
    return dtypes


def adapted(layer: nn.Module) -> AdaptedLayer:
    """The layer or module, ready to take adapters."""
    kind = kind_of(layer)
    if kind is None:
        return AdaptedModule(layer)
    return LoRALinear(layer) if kind.is_linear else AdaptedLayer(layer)
