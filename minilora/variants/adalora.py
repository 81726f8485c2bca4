"""AdaLoRA: an update like a singular value decomposition; training takes rank from the layers that need little.

    ΔW = s·B diag(E) A                         A (r, in), E (r, 1), B (out, r); s = α / (init_r + 1e-5)      (3)
    loss + w · mean over layers and factors of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖                                     (4)

A triplet is column i of B, E_i and row i of A. Its importance, from the gradients of every step, and its budget:

    I = |p · ∂L/∂p|                                        for each number p in A, E, B                     (8)
    Ī ← β₁ Ī + (1 − β₁) I                                  smoothed                                          (9)
    Ū ← β₂ Ū + (1 − β₂) |I − Ī|                            its uncertainty                                   (10)
    S_i = Ī Ū of E_i + mean of Ī Ū over row i of A + mean over column i of B                                 (7, 11)
    b(t) = b_T + (b_0 − b_T) (1 − (t − t_init) / (T − t_init))³       triplets that all layers may keep      (12)

After each step E_i becomes 0 for all but the b(t) triplets with the highest S_i, of all layers together. Such a triplet
goes on learning, and can come back, until step T = total_step − tfinal.

Zhang et al. 2023, arXiv 2303.10512, section 3. The norms, their mean, the 1e-5 and the order of the steps are PEFT's.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minilora.adapters import Adapter, ConvKind, LoRAConfig, at_least_float32, register
from minilora.errors import InputError

FACTORS = ("lora_A", "lora_E", "lora_B")


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(LoRAConfig):
    """The settings of AdaLoRA, in the names and defaults of PEFT's `AdaLoraConfig`; r is not used.

    Raises:
        InputError: where a value is out of range, or a setting of LoRA means nothing here.
    """

    peft_type: ClassVar[str] = "ADALORA"
    pattern_suffix: ClassVar[str] = ".lora_E"

    target_r: int = 8
    """the average rank of a layer at the end"""
    init_r: int = 12
    """the rank of every layer at the start"""
    tinit: int = 0
    """steps before the budget begins to fall"""
    tfinal: int = 0
    """steps at the end with fixed ranks"""
    deltaT: int = 1  # noqa: N815 - PEFT's name
    """steps between two allocations of the budget"""
    beta1: float = 0.85
    """smoothing of the importance"""
    beta2: float = 0.85
    """smoothing of its uncertainty"""
    orth_reg_weight: float = 0.5
    """weight of the term that keeps A and B orthogonal"""
    total_step: int | None = None
    """how many steps the training will have, over which the ranks come down"""
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
    """which triplets each layer has kept, of the init_r that it had: found in training, and written by save_adapter"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("use_dora", "use_rslora", "alpha_pattern", "lora_bias"):
            if getattr(self, key):
                raise InputError(f"AdaLoRAConfig: {key} has no effect in AdaLoRA: leave it out")
        self.require("init_lora_weights", isinstance(self.init_lora_weights, bool), "True or False")
        if self.r != LoRAConfig.r:
            warnings.warn("AdaLoRA does not use r: give init_r and target_r", stacklevel=3)
        self.require("total_step", (self.total_step or 0) >= 1, "the number of training steps, at least 1")
        if not 0 <= self.tinit < self.last_allocation <= (self.total_step or 0):
            raise InputError(
                f"AdaLoRAConfig: of total_step={self.total_step} steps, tinit={self.tinit} and tfinal={self.tfinal}"
                " leave none in which the ranks could come down"
            )
        self.require("deltaT", self.deltaT >= 1, "at least 1")
        for key in ("beta1", "beta2"):
            self.require(key, 0 < getattr(self, key) < 1, "between 0 and 1")
        self.require("orth_reg_weight", self.orth_reg_weight >= 0, "at least 0")

    def check_ranks(self) -> None:
        self.require("target_r", 1 <= self.target_r <= self.init_r, f"at least 1 and at most init_r={self.init_r}")

    @property
    def last_allocation(self) -> int:
        """The step T after which no rank changes."""
        assert self.total_step is not None
        return self.total_step - self.tfinal

    def budget(self, step: int, layers: int) -> int | None:
        """How many triplets that many layers keep after this step, b(t); None where the step takes none away."""
        if step <= self.tinit or (step % self.deltaT and step != self.last_allocation):
            return None
        start, target = layers * self.init_r, layers * self.target_r
        remaining = 1 - (step - self.tinit) / (self.last_allocation - self.tinit)
        return int((start - target) * remaining**3 + target)


@register
class AdaLoRA(Adapter):
    """lora_A (r, in·kernel), lora_E (r, 1) and lora_B (out, r) of a linear layer or an nn.Conv2d.

    r is init_r; less once it is loaded with the rank_pattern of a training that is over: then `after_step` leaves it.
    """

    config_class = AdaLoRAConfig
    kept: Tensor | None

    def __init__(self, layer: nn.Module, config: AdaLoRAConfig, path: str, layers: int) -> None:
        super().__init__(layer, config, path)
        is_conv2d = isinstance(self.kind, ConvKind) and len(self.kind.shape) == 4 and self.kind.groups == 1
        if not (self.kind.is_linear or is_conv2d):
            raise InputError(
                f"{path or 'the layer'} is a {type(layer).__name__}: AdaLoRA adapts linear layers and"
                " nn.Conv2d without groups"
            )
        self.layers = layers  # that share the budget
        pattern = (config.rank_pattern or {}).get(f"{path}.lora_E")
        r = config.init_r if pattern is None else sum(pattern)
        alpha = config.lora_alpha if config.lora_alpha > 0 else config.init_r
        self.scaling = alpha / (config.init_r + 1e-5)
        self.dropout = nn.Dropout(config.lora_dropout)
        out_features, *rest = self.kind.shape
        self.lora_A = nn.Parameter(torch.randn(r, math.prod(rest), dtype=torch.float32))
        self.lora_E = nn.Parameter(torch.randn(r, 1, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.randn(out_features, r, dtype=torch.float32))
        torch.randn(1)  # PEFT draws one number more
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_E)
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.normal_(self.lora_B, std=0.02)
        # Of the training, as the optimizer's moments are: Ī and Ū in the shapes of the factors, and (r,) of bools.
        for name in (*(f"{kind}_{factor}" for kind in ("importance", "uncertainty") for factor in FACTORS), "kept"):
            self.register_buffer(name, None, persistent=False)

    @classmethod
    def share(cls, config: AdaLoRAConfig, layers: Mapping[str, nn.Module]) -> int:
        return len(layers)

    # --- the update

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """s·B diag(E) A dropout(x) (+ add), the products in the dtype of x."""
        x = self.dropout(x)
        if isinstance(self.kind, ConvKind):
            return super().forward(x, add)
        h = self.kind.apply(x, (self.lora_E * self.lora_A).to(x.dtype))
        return self.kind.pointwise(h, (self.scaling * self.lora_B).to(x.dtype), add)

    def delta(self) -> Tensor:
        """s·B diag(E) A (out, in, *kernel)."""
        A, E, B = (at_least_float32(factor) for factor in (self.lora_A, self.lora_E, self.lora_B))
        return (self.scaling * B @ (E * A)).view(self.kind.shape)

    def regularization(self) -> Tensor:
        """The part of this layer in w · mean(‖A Aᵀ − I‖, ‖Bᵀ B − I‖), over the factors of all layers."""
        A, B = self.lora_A, self.lora_B
        identity = torch.eye(len(A), dtype=A.dtype, device=A.device)
        norms = torch.linalg.vector_norm(A @ A.T - identity) + torch.linalg.vector_norm(B.T @ B - identity)
        weight: float = self.config.orth_reg_weight
        return weight * norms / (2 * self.layers)

    # --- the ranks

    def check_before_training(self, name: str, total_steps: int) -> None:
        """The ranks come down over the steps that the configuration counts: in fewer they would not get there."""
        if self.config.total_step > total_steps:
            raise InputError(
                f"adapter {name!r} was made with total_step={self.config.total_step}, and this run has {total_steps}"
                " steps: its ranks would not come down to target_r"
            )

    @classmethod
    @torch.no_grad()
    def after_step(cls, adapters: Mapping[str, Adapter], step: int) -> None:
        """Take the importance in from the gradients, and bring the ranks to the budget of this step."""
        layers = [adapter for adapter in adapters.values() if isinstance(adapter, AdaLoRA)]
        config: AdaLoRAConfig = layers[0].config
        if config.rank_pattern is not None:
            return
        if step < config.last_allocation:
            if all(parameter.grad is None for layer in layers for parameter in layer.parameters()):
                raise InputError("AdaLoRA measures by the gradients: call after_step(model, step) before zero_grad()")
            for layer in layers:
                layer.measure()
        if step > config.last_allocation:
            for layer in layers:
                layer.mask()  # what the optimizer has given to E since
            return
        budget = config.budget(step, len(layers))
        if budget is not None:
            allocate(layers, budget)

    def measure(self) -> None:
        """Ī and Ū of every number, with the gradient of this step."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for name in FACTORS:
            p = getattr(self, name)
            importance, uncertainty = getattr(self, f"importance_{name}"), getattr(self, f"uncertainty_{name}")
            if importance is None:
                importance, uncertainty = torch.zeros_like(p), torch.zeros_like(p)
            now = (
                torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            )  # an expert that no token chose has none
            importance = beta1 * importance + (1 - beta1) * now
            uncertainty = beta2 * uncertainty + (1 - beta2) * (now - importance).abs()
            setattr(self, f"importance_{name}", importance)
            setattr(self, f"uncertainty_{name}", uncertainty)

    def triplet_importance(self) -> Tensor:
        """S (r,)."""
        if self.importance_lora_E is None:
            raise InputError("AdaLoRA has measured no importance yet: call after_step(model, step) after every step")
        A, E, B = (getattr(self, f"importance_{name}") * getattr(self, f"uncertainty_{name}") for name in FACTORS)
        importance: Tensor = E.flatten() + (A.mean(dim=1) + B.mean(dim=0))
        return importance

    def mask(self) -> None:
        """E = 0 for the triplets that are not kept."""
        if self.kept is None:
            raise InputError("AdaLoRA has allocated no ranks yet: call after_step(model, step) after every step")
        self.lora_E.masked_fill_(~self.kept[:, None], 0.0)

    # --- what is stored

    def triplets_in_use(self) -> Tensor | None:
        """(r,) of bools: kept, or learnt again since; None before the first allocation."""
        return None if self.kept is None else self.kept | (self.lora_E.detach().flatten() != 0)

    def saved_tensors(self) -> dict[str, Tensor]:
        saved, rows = super().saved_tensors(), self.triplets_in_use()
        if rows is None:
            return saved
        return saved | {"lora_A": self.lora_A[rows], "lora_E": self.lora_E[rows], "lora_B": self.lora_B[:, rows]}

    @classmethod
    def peft_values(cls, values: dict[str, Any], adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        rows = {path: adapter.triplets_in_use() for path, adapter in adapters.items() if isinstance(adapter, AdaLoRA)}
        found = {f"{path}.lora_E": used.tolist() for path, used in rows.items() if used is not None}
        return values | {"rank_pattern": found or values["rank_pattern"]}

    def extra_repr(self) -> str:
        return f"r={len(self.lora_E)}, scaling={self.scaling:g}"


def allocate(layers: list[AdaLoRA], budget: int) -> None:
    """Keep the `budget` triplets of highest importance over all layers, and set E = 0 for the others."""
    scores = [layer.triplet_importance() for layer in layers]
    together = torch.cat([score.to(scores[0].device) for score in scores])
    surplus = len(together) - budget
    threshold = together.kthvalue(surplus).values.item() if surplus > 0 else -math.inf
    for layer, score in zip(layers, scores, strict=True):
        layer.kept = ~(score <= threshold)
        layer.mask()
