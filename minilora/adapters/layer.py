"""A layer with adapters on it: which of them act, what they compute together, merged and unmerged.

y = W x + b + Σ ΔW x                      over the active adapters, where all of them are additive
y = (… ((W, b) → W′, b′) → W″, b″ …) x    where one is not: each changes the layer that those before it left
y_i = W x_i + b + ΔW_i x_i                in a mixed batch, where row i has an adapter of its own
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeGuard, cast

import torch
from torch import Tensor, nn

from minilora.adapters.adapter import Adapter, Below
from minilora.adapters.fused_lora import LoRAProduct, runs_as_written
from minilora.adapters.gated_lora import gated_lora
from minilora.adapters.layer_kinds import LayerKind, kind_of
from minilora.adapters.row_names import RowNames
from minilora.errors import InputError
from minilora.nf4 import NF4Linear, QuantizedTensor, linear_onto
from minilora.torch_helpers import is_plainly_called, without_autocast


class AdaptedLayer(nn.Module):
    """A layer and its adapters; attributes that it lacks are those of the layer.

    base_layer: any layer that `kind_of` knows, kept frozen by `add_adapter`.
    adapters: every adapter by name. active: the names that act, in the order in which they are applied.
    merged: the names folded into base_layer by `merge`. enabled: False makes this the base layer again.
    row_names: inside `adapters_for_rows`, the name of the adapter that each row of x takes instead of the active ones.
    """

    any_module: ClassVar[bool] = False
    # Where transformers writes a model, as its Trainer does, it asks every module what in it may be tied: W of a head,
    # and what an adapter trains of a tied pair. Of equal tensors it then writes one.
    _tied_weights_keys: ClassVar[dict[str, str]] = {".*": ".*"}

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        kind = kind_of(base_layer)
        if kind is None and not self.any_module:
            raise InputError(f"a {type(base_layer).__name__} cannot take an adapter")
        self.kind: LayerKind = kind  # type: ignore[assignment]  # None in an AdaptedModule only
        self.base_layer: Any = base_layer
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []
        self.merged: list[str] = []
        self.enabled = True
        self.row_names: RowNames | None = None
        self._unmerged: list[nn.Module] = []  # while merged: the layer as it was, hidden from state_dict

    def forward(self, x: Tensor) -> Tensor:
        """x as the base layer takes it -> what the base layer gives, changed by the active adapters."""
        if self.row_names is not None and self.enabled:
            return self.row_by_row(x, self.row_names.rows(x, self))
        adapters = self.acting_adapters()
        if not adapters:
            return self.layer_in_use()(x)
        if all(adapter.additive for adapter in adapters):
            update = self.start(adapters, x.dtype)
            for adapter in adapters:
                update = adapter(x, add=update)
            return self.onto(update, x)
        return self.below(adapters)(x)

    def row_by_row(self, x: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Each row of x (rows, …) with the adapter of its own: `rows` gives the numbers of the rows of each name.

        W x is one product for all rows, accumulated onto each row's own ΔW x; a 4-bit W is dequantized once. The rows
        of an adapter that is not additive are computed apart. The rows of a name without an adapter here are W x + b.
        """
        adapters = [(cast(Adapter, self.adapters[name]), i) for name, i in rows.items() if name in self.adapters]
        update = start = self.start([], x.dtype)
        parts = [
            (adapter(x.index_select(0, i), add=self.start([adapter], x.dtype)), i)
            for adapter, i in adapters
            if adapter.additive
        ]
        if parts:
            some = parts[0][0]
            update = some.new_zeros(len(x), *some.shape[1:])
            update = update if start is None else update + start.to(update.dtype)
            for part, i in parts:
                update.index_copy_(0, i, part)
        y = self.onto(update, x)
        for adapter, i in adapters:
            if not adapter.additive:
                y = y.index_copy(0, i, self.below([adapter])(x.index_select(0, i)).to(y.dtype))
        return y

    def _base(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """W x + b (+ add)."""
        y = self.base_layer(x)
        return y if add is None else y + add.to(y.dtype)

    def start(self, adapters: list[Adapter], dtype: torch.dtype) -> Tensor | None:
        """What the first update is added to, where `onto` will not add it: the adapters' change of b, or None."""
        bias = self.own_bias(adapters)
        if bias is None:
            return None
        along_channels = [1] * (len(self.kind.shape) - 2)
        return (bias - self.base_layer.bias).to(dtype).view(-1, *along_channels)

    def own_bias(self, adapters: list[Adapter]) -> Tensor | None:
        """b + Σ (bᵢ − b) over the adapters that have a bias bᵢ of their own, in float32; None where none has."""
        of_adapters = [adapter._parameters["bias"] for adapter in adapters]  # a tenth of the time that .bias takes
        own = [bias for bias in of_adapters if bias is not None]
        if not own:
            return None
        return sum((bias - self.base_layer.bias for bias in own[1:]), start=own[0])

    def below(self, adapters: list[Adapter]) -> Below:
        """The layer with these adapters on it, one after the other."""
        bias = self.own_bias(adapters)
        if bias is None:
            return Below(self.base_layer, self._base, self.kind, adapters, getattr(self.base_layer, "bias", None))
        return Below(self.base_layer, partial(self._base_with_own_bias, adapters), self.kind, adapters, bias)

    def _base_with_own_bias(self, adapters: list[Adapter], x: Tensor, add: Tensor | None = None) -> Tensor:
        """W x (+ add) + the adapters' b."""
        start = self.start(adapters, x.dtype)
        return self.onto(start if add is None or start is None else add + start, x)

    def onto(self, update: Tensor | None, x: Tensor) -> Tensor:
        """What `start` left out of y, + W x: the sum of all."""
        return self._base(x, update)

    def active_adapters(self) -> list[Adapter]:
        """The adapters that act here; an active name may be on other layers only."""
        adapters = self.adapters
        return [cast(Adapter, adapters[name]) for name in self.active if name in adapters]

    def changes_weight(self) -> bool:
        """True if an active adapter changes W, and not a bias alone."""
        return any(adapter.changes_weight for adapter in self.active_adapters())

    def acting_adapters(self) -> list[Adapter]:
        """The adapters that forward applies: none where they are switched off, or already in the weight."""
        return [] if self.merged or not self.enabled else self.active_adapters()

    def layer_in_use(self) -> Any:
        """What the acting adapters are applied to: base_layer, or while switched off the layer as it was."""
        return self.base_layer if self.enabled or not self._unmerged else self._unmerged[0]

    # --- merge

    def merged_weight(self) -> tuple[Tensor, Tensor | None]:
        """W′ (out, in, *kernel) and b′ with the active adapters folded in, in float32 or better; nothing is changed."""
        with without_autocast(self.base_layer.weight.device):
            below = self.below(self.active_adapters())
            return below.weight(), below.bias()

    @torch.no_grad()
    def merge(self, name: str = "the layer", safe: bool = True) -> None:
        """Swap base_layer for a dense layer with weight W + Σ ΔW, summed in float32 and rounded once.

        An NF4 layer becomes a dense one in its compute dtype (float32 if it has none): in 4 bits the update would be
        lost. The layer as it was is kept aside for `unmerge`, so tied weights and W itself stay untouched.
        Raises InputError naming the layer (`name`) where the base layer is not dense, or where the sum is not finite;
        safe=False does not look at the sum.
        """
        if self.merged or not self.active_adapters():
            return
        base = self.base_layer
        if "weight" not in base._parameters and "weight" not in base._buffers:  # weight_norm, spectral_norm, pruning
            raise InputError(f"{name}: its weight is computed from other tensors; remove what does so before merging")
        try:
            if not self.kind.is_computed_by(base):
                raise InputError("it computes something else than W x + b")
            W, bias = self.merged_weight()
        except InputError as error:
            raise InputError(f"{name}: cannot merge into a {type(base).__name__}: {error}") from None
        dtype = (base.compute_dtype or torch.float32) if isinstance(base, NF4Linear) else base.weight.dtype
        W, bias = W.to(dtype), None if bias is None else bias.to(dtype)
        if safe and not all(tensor.isfinite().all() for tensor in (W, bias) if tensor is not None):
            raise InputError(f"{name}: merging {self.active} gives NaN or infinity in {dtype}; nothing was merged")
        self.put_in_place(self.kind.with_weight(base, W, bias))

    def put_in_place(self, merged: nn.Module) -> None:
        """Use this layer, which holds the active adapters, for base_layer, and keep that one aside for `unmerge`."""
        self._unmerged, self.base_layer, self.merged = [self.base_layer], merged, list(self.active)

    def unmerge(self) -> None:
        """Put back the layer that `merge` set aside: the same object, bit for bit."""
        if self.merged:
            self.base_layer, self.merged = self._unmerged.pop(), []

    # --- as a module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedLayer":
        for layer in self._unmerged:  # .to() and .cuda() reach the layer that is set aside too
            layer._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> "AdaptedLayer":
        for layer in self._unmerged:
            layer.train(mode)
        super().train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        """weight, bias, in_features, …: models look at their layers' attributes, so give the base layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet
                raise
            adapters = self.acting_adapters() if self.can_be_read(name) else []
            return self.read(name, adapters) if adapters else getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A parameter is the base layer's: a transformers model ties its head's weight by setting it."""
        if isinstance(value, nn.Parameter):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def can_be_read(self, name: str) -> bool:
        """True for what a model may compute with itself, instead of calling the layer."""
        return name in ("weight", "bias")

    def read(self, name: str, adapters: list[Adapter]) -> Any:
        """W′ or b′ in the layer's dtype, with a gradient: for a model that reads them and does not call the layer.

        So do nn.MultiheadAttention with its out_proj and Mamba with its dt_proj; lora_dropout has no part in it. A
        weight in 4 bits is given as it is packed; in a mixed batch, where each row has its W′, one without numbers.
        """
        own = getattr(self.base_layer, name)
        if own is None or isinstance(self.base_layer, NF4Linear):
            return own
        if self.row_names is not None:
            return torch.empty_like(own, device="meta")
        with without_autocast(own.device):
            below = self.below(adapters)
            value = self.kind.stored(below.trained_weight()) if name == "weight" else below.bias()
        return None if value is None else value.to(own.dtype)

    def extra_repr(self) -> str:
        return f"active={self.active}, merged={self.merged}"


class LoRALinear(AdaptedLayer):
    """A linear layer (nn.Linear, NF4Linear, transformers' Conv1D) and its adapters: y = W x + b + Σ s·B A x.

    y = ((b + s₁B₁A₁x) + s₂B₂A₂x + …) + Wx: the small terms first, so that the one large product accumulates onto
    them in float32 and y is rounded once. Rounding Wx and then the sum, in bfloat16, errs 1.4 times as far.

    Args:
        base_layer: the layer; attributes that this one lacks are read from it.

    Raises:
        InputError: where the layer cannot take an adapter.
    """

    def shared_part(self, x: Tensor) -> LoRAProduct | None:
        """What forward computes, for `shared_input.project`; None but where one plain LoRA acts on a frozen W and b."""
        low_rank = self._only_low_rank(x)
        W = None if low_rank is None else _frozen_weight(self.base_layer, x.dtype)
        return None if W is None or low_rank is None else LoRAProduct(W, self.base_layer.bias, *low_rank)

    def after_swiglu(self, gate: Tensor, up: Tensor) -> Tensor | None:
        """forward(silu(gate) · up), for `shared_input.project_swiglu`; None but where one plain LoRA acts."""
        low_rank = self._only_low_rank(up)
        start = self.start([], up.dtype)
        if low_rank is None or (start is not None and start.requires_grad):
            return None
        width = up.shape[-1]
        x, update = gated_lora(gate.reshape(-1, width), up.reshape(-1, width), start, *low_rank)
        return self.onto(update.view(*up.shape[:-1], update.shape[1]), x.view(up.shape))

    def _only_low_rank(self, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """A, B, s of the one adapter that acts on x, if nothing but the layer's product and s·B(A x) would be in y."""
        adapters = self.acting_adapters()
        if self.row_names is not None or len(adapters) != 1 or type(self).forward is not AdaptedLayer.forward:
            return None
        plain = is_plainly_called(adapters[0]) and adapters[0]._parameters["bias"] is None and runs_as_written(x)
        return adapters[0].low_rank() if plain else None

    def start(self, adapters: list[Adapter], dtype: torch.dtype) -> Tensor | None:
        base = self.base_layer
        if not _is_plain(base):
            return super().start(adapters, dtype)
        bias = self.own_bias(adapters)
        return base.bias if bias is None else bias.to(dtype)

    def onto(self, update: Tensor | None, x: Tensor) -> Tensor:
        base = self.base_layer
        if _is_plain(base):
            return linear_onto(update, x, base.weight)
        return self._base(x, update)

    def _base(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        base = self.base_layer
        if not isinstance(base, NF4Linear):
            return super()._base(x, add)
        return base(x, add if add is None or add.dim() == x.dim() else add.expand(*x.shape[:-1], -1))


def _is_plain(base: nn.Module) -> TypeGuard[nn.Linear]:
    """True if nothing but W x + b happens in a call of the base layer, so that its product can be made here."""
    return type(base) is nn.Linear and is_plainly_called(base)


def _frozen_weight(base: nn.Module, dtype: torch.dtype) -> Tensor | QuantizedTensor | None:
    """W, where a call of the base layer is W x + b in this dtype and neither is trained; else None."""
    own = base._parameters.values()  # a fifth of the time that .parameters() takes
    if any(parameter is not None and parameter.requires_grad for parameter in own) or not is_plainly_called(base):
        return None
    if type(base) is NF4Linear and base.compute_dtype in (None, dtype):
        return base.quantized()
    return base.weight if type(base) is nn.Linear and base.weight.dtype == dtype else None
