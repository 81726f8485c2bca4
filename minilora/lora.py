"""LoRA on one linear layer: the configuration, the low-rank update, and the layer that carries it.

                  x  (…, in)
                  │
          ┌───────┴────────┐
          │                ▼  dropout
          │           ┌─────────┐
          │           │ A (r,in)│   kaiming or gaussian, trained
          ▼           └────┬────┘
   ┌─────────────┐         │  r numbers per token
   │ W (out, in) │    ┌────┴────┐
   │   frozen,   │    │ B(out,r)│   zero at the start, trained
   │ dense or NF4│    └────┬────┘
   └──────┬──────┘         │  · s
          └──────► + ◄─────┘
                   │
                   ▼
                 y = W x + b + s·B A x          s = α/r,  rsLoRA: s = α/√r

LoRA: Hu et al. 2021, arXiv 2106.09685, section 4.1 (the equation, the initialisation, α/r).
rsLoRA: Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2 (α/√r).
QLoRA: Dettmers et al. 2023, arXiv 2305.14314, section 3, equations 5 and 6 (W in NF4, dequantized to use it).
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import InputError
from minilora.linear4bit import NF4Linear


@dataclass
class LoRAConfig:
    """What to adapt and how, in PEFT's `LoraConfig` names and defaults."""

    r: int = 8
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    task_type: str | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None


def linear_onto(add: Tensor | None, x: Tensor, W: Tensor) -> Tensor:
    """add + x W^T as one GEMM that starts from `add` and so rounds once. add: None, (out,) or (…, out)."""
    if add is None or add.dim() == 1:
        return F.linear(x, W, add)
    y = torch.addmm(add.reshape(-1, add.shape[-1]), x.reshape(-1, x.shape[-1]), W.T)
    return y.view(add.shape)


class LoRA(nn.Module):
    """One adapter of one linear layer: x ↦ s·B A dropout(x)."""

    def __init__(
        self, in_features: int, out_features: int, config: LoRAConfig, r: int, lora_alpha: float
    ) -> None:
        super().__init__()
        self.config, self.r, self.lora_alpha = config, r, lora_alpha
        self.scaling = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A = nn.Linear(in_features, r, bias=False).weight
        self.lora_B = nn.Linear(r, out_features, bias=False).weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A, zero B: s·BA = 0, so training starts from the base model exactly."""
        if self.config.init_lora_weights is False:
            return
        if self.config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """s·B A dropout(x) (+ add), computed in the dtype of x from the float32 masters."""
        A = self.lora_A.to(x.dtype)
        sB = (self.scaling * self.lora_B).to(x.dtype)
        return linear_onto(add, F.linear(self.dropout(x), A), sB)

    def delta(self) -> Tensor:
        """s·BA (out, in), in the masters' dtype."""
        return self.scaling * (self.lora_B @ self.lora_A)


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapters: y = W x + b + Σ s·B A x over the active adapters."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []
        self.enabled = True
        self.merged: list[str] = []
        self._original: list[nn.Module] = []  # a list, so that state_dict does not see the unmerged layer

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return (self._original or [self.base_layer])[0](x)
        names = [] if self.merged else [name for name in self.active if name in self.adapters]
        if not names:
            return self.base_layer(x)
        base = self.base_layer
        fused = type(base) is nn.Linear
        update = base.bias if fused else None
        for name in names:
            update = self.adapters[name](x, add=update)
        if fused:
            return linear_onto(update, x, base.weight)
        if isinstance(base, NF4Linear):
            return base(x, add=update)
        return base(x) + update

    @torch.no_grad()
    def merge(self, name: str = "layer") -> None:
        """Put W + Σ s·BA in a dense layer of its own, computed in float32 and rounded once."""
        names = [adapter for adapter in self.active if adapter in self.adapters]
        if self.merged or not names:
            return
        base = self.base_layer
        if isinstance(base, NF4Linear):
            dtype = base.compute_dtype or torch.float32
            W = base.dequantize(torch.float32)
        else:
            dtype = base.weight.dtype
            W = base.weight
        merged = W.float()
        for adapter in names:
            merged = merged + self.adapters[adapter].delta()
        merged = merged.to(dtype)
        if not torch.isfinite(merged).all():
            raise InputError(f"{name}: merging {', '.join(names)} gives NaN or infinity; nothing was merged")
        dense = nn.Linear(merged.shape[1], merged.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(merged, requires_grad=False)
        dense.bias = base.bias
        self._original, self.base_layer, self.merged = [base], dense, names

    def unmerge(self) -> None:
        """Put the layer that was merged back, bit for bit."""
        if self.merged:
            self.base_layer = self._original.pop()
            self.merged = []

    def extra_repr(self) -> str:
        return f"active={self.active}, merged={self.merged}"
