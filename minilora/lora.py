"""LoRA on one linear layer: the configuration, the low-rank update, and the layer that carries it.

                 x (…, in)
                 │
         ┌───────┴───────┐
         │               ▼
         │            dropout
         │               │
         ▼          ┌────┴─────┐
  ┌─────────────┐   │ A (r,in) │   random at the start, trained, float32
  │ W (out, in) │   └────┬─────┘
  │ frozen:     │        │  r numbers a token
  │ dense or    │   ┌────┴─────┐
  │ NF4         │   │ B (out,r)│   zero at the start, trained, float32
  └──────┬──────┘   └────┬─────┘
         │               │  · s
         └─────► + ◄─────┘
                 │
                 ▼
                 y = W x + b + s·B A x         s = α/r, or α/√r with rsLoRA

LoRA, the equation, the initialisation and α/r: Hu et al. 2021, arXiv 2106.09685, section 4.1.
rsLoRA, α/√r: Kalajdzievski 2023, arXiv 2312.03732, section 3.
QLoRA, W kept in NF4 and dequantized to use it: Dettmers et al. 2023, arXiv 2305.14314, section 3, equations 5 and 6.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import InputError
from minilora.linear4bit import NF4Linear


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers to adapt and how, in the names and defaults of PEFT's `LoraConfig`.

    Raises InputError for a value out of range.
    """

    r: int = 8
    """rank of the update"""
    target_modules: str | list[str] | None = None
    """"all-linear" (all but the output head), names or ends of names, or one regular expression for a whole name"""
    exclude_modules: str | list[str] | None = None
    """layers to leave alone, written like target_modules"""
    lora_alpha: float = 8
    """the update is scaled by lora_alpha / r"""
    lora_dropout: float = 0.0
    """probability with which an input of A is dropped in training"""
    use_rslora: bool = False
    """scale by lora_alpha / sqrt(r) instead"""
    init_lora_weights: bool | Literal["gaussian"] = True
    """True: Kaiming-uniform A; "gaussian": A ~ N(0, 1/r²); both with B = 0. False: A and B random (for tests)"""
    bias: Literal["none"] = "none"
    """biases stay frozen"""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """another r for the layers whose name a pattern ends"""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """another lora_alpha for the layers whose name a pattern ends"""
    task_type: str | None = "CAUSAL_LM"
    """written to adapter_config.json for PEFT"""
    base_model_name_or_path: str | None = None
    """written to adapter_config.json for PEFT"""

    def __post_init__(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or r < 1:
                raise InputError(f"LoRAConfig: a rank must be a whole number of at least 1, not {r!r}")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float):
                raise InputError(f"LoRAConfig: lora_alpha must be a number, not {alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"LoRAConfig: lora_dropout must be at least 0 and below 1, not {self.lora_dropout!r}")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise InputError(
                f"LoRAConfig: init_lora_weights={self.init_lora_weights!r} is not one of True, False, 'gaussian'"
            )
        if self.bias != "none":
            raise InputError(f"LoRAConfig: bias={self.bias!r} is not supported; biases stay frozen with 'none'")


def linear_onto(add: Tensor | None, x: Tensor, W: Tensor) -> Tensor:
    """`add + x W^T` as one GEMM that starts from `add`: accumulated in float32, rounded once.

    add: None, (out,) or (…, out); x: (…, in); W: (out, in); returns (…, out) in their common dtype.
    """
    if add is None or add.dim() == 1:
        return F.linear(x, W, add)
    rows = torch.addmm(add.reshape(-1, add.shape[-1]), x.reshape(-1, x.shape[-1]), W.T)
    return rows.view(add.shape)


class LoRA(nn.Module):
    """One adapter of one linear layer: x ↦ s·B A dropout(x).

    Parameters: lora_A (r, in_features) and lora_B (out_features, r), float32 masters whatever the model's dtype.
    Source: arXiv 2106.09685, section 4.1; the same seed draws the same A as PEFT does.
    """

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig, r: int, lora_alpha: float) -> None:
        super().__init__()
        self.config, self.r, self.lora_alpha = config, r, lora_alpha
        self.scaling = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        # nn.Linear draws a weight that reset_parameters replaces: this keeps the random stream that of PEFT.
        self.lora_A = nn.Linear(in_features, r, bias=False, dtype=torch.float32).weight
        self.lora_B = nn.Linear(r, out_features, bias=False, dtype=torch.float32).weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A and zero B, so that s·BA = 0 and training starts from the base model itself."""
        if self.config.init_lora_weights is False:
            return
        if self.config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(−1/√in, 1/√in)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """s·B A dropout(x) (+ add): x (…, in), add (out,) or (…, out); the products run in the dtype of x."""
        A = self.lora_A.to(x.dtype)
        sB = (self.scaling * self.lora_B).to(x.dtype)  # s before the cast: one rounding, not two
        return linear_onto(add, F.linear(self.dropout(x), A), sB)

    def delta(self) -> Tensor:
        """What a merge adds to W: s·BA (out, in), in float32 even where somebody made the masters bfloat16."""
        dtype = torch.promote_types(self.lora_B.dtype, torch.float32)
        return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


class LoRALinear(nn.Module):
    """A linear layer and its adapters: y = W x + b + Σ s·B A x, summed over the active adapters.

    base_layer: nn.Linear (or a subclass) or NF4Linear, kept frozen by `add_adapter`.
    adapters: every adapter by name. active: the names that act, in the order in which they are added.
    merged: the names folded into base_layer by `merge`. enabled: False makes this the base layer again.
    """

    def __init__(self, base_layer: nn.Linear | NF4Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []
        self.merged: list[str] = []
        self.enabled = True
        self._unmerged: list[nn.Linear | NF4Linear] = []  # while merged: the layer as it was, hidden from state_dict

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)."""
        adapters = self.active_adapters()
        if not self.enabled:
            return (self._unmerged or [self.base_layer])[0](x)
        if self.merged or not adapters:
            return self.base_layer(x)

        # y = ((b + s₁B₁A₁x) + s₂B₂A₂x + …) + Wx: the small terms first, so that the one large GEMM accumulates
        # onto them in float32 and y is rounded once. Rounding Wx and then the sum, in bfloat16, errs 1.4 times as far.
        base = self.base_layer
        can_start_from_update = type(base) is nn.Linear and not (base._forward_hooks or base._forward_pre_hooks)
        update = base.bias if can_start_from_update else None
        for adapter in adapters:
            update = adapter(x, add=update)
        if can_start_from_update:
            return linear_onto(update, x, base.weight)
        if isinstance(base, NF4Linear):
            return base(x, add=update)
        return base(x) + update

    def active_adapters(self) -> list[LoRA]:
        """The adapters that act here; an active name may be on other layers only."""
        return [cast(LoRA, self.adapters[name]) for name in self.active if name in self.adapters]

    @torch.no_grad()
    def merge(self, name: str = "the layer") -> None:
        """Swap base_layer for a dense layer with weight W + Σ s·BA, summed in float32 and rounded once.

        An NF4 layer becomes a dense one in its compute dtype (float32 if it has none): in 4 bits the update would be
        lost. The layer as it was is kept aside for `unmerge`, so tied weights and W itself stay untouched.
        Raises InputError naming the layer (`name`) where the sum is not finite or the base layer is not dense.
        """
        adapters, base = self.active_adapters(), self.base_layer
        if self.merged or not adapters:
            return
        if isinstance(base, NF4Linear):
            W, dtype = base.dequantize(torch.float32), base.compute_dtype or torch.float32
        elif base.weight.is_floating_point():
            W, dtype = base.weight, base.weight.dtype
        else:
            raise InputError(f"{name}: cannot merge into a {type(base).__name__}, whose weight is {base.weight.dtype}")
        for adapter in adapters:
            W = W + adapter.delta()  # W + s·BA, in float32 because delta() is
        W = W.to(dtype)
        if not torch.isfinite(W).all():
            raise InputError(f"{name}: merging {self.active} gives NaN or infinity in {dtype}; nothing was merged")
        dense = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(W, requires_grad=False)
        dense.register_parameter("bias", base.bias)
        self._unmerged, self.base_layer, self.merged = [base], dense, list(self.active)

    def unmerge(self) -> None:
        """Put back the layer that `merge` set aside: the same object, bit for bit."""
        if self.merged:
            self.base_layer, self.merged = self._unmerged.pop(), []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALinear":
        for layer in self._unmerged:  # .to() and .cuda() reach the layer that is set aside too
            layer._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: transformers' code looks at the dtype and device of a linear layer's weight."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    def extra_repr(self) -> str:
        return f"active={self.active}, merged={self.merged}"
