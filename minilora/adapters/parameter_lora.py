"""LoRA on parameters that are no layer's weight: the experts of a Mixture-of-Experts, which are one tensor.

    W (E, out, in)            E experts side by side, in transformers since version 5
    ΔW_e = s·B_e A_e          a low-rank update for each; A (E·r, in) and B (out, r·E) hold all of them

The module is called with W + ΔW in the place of W. A two-dimensional parameter, such as a router's, is one expert.

LoRA: arXiv 2106.09685, section 4.1. The layout of A and B is that of PEFT's `target_parameters`.
"""

import math

import torch
from torch import Tensor, nn

from minilora.adapters.adapter import AdapterConfig
from minilora.adapters.initialization import gaussian, kaiming
from minilora.adapters.layer_kinds import kind_of
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.targets import matches, modules_before_adapters, nearest_names
from minilora.adapters.trained_parts import Part
from minilora.errors import InputError


class ExpertFactors(nn.Module):
    """lora_A (E·r, in) and lora_B (out, r·E), float32; the same seed draws the same A as PEFT does."""

    def __init__(self, W: Tensor, config: LoRAConfig, path: str, is_transposed: bool) -> None:
        super().__init__()
        self.r, lora_alpha = config.rank_and_alpha(path)
        self.scaling = lora_alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        self.experts = len(W) if W.dim() == 3 else 1
        self.is_transposed = is_transposed and W.dim() == 3  # W (E, in, out)
        out_features, in_features = W.shape[-2:] if not self.is_transposed else W.shape[:-3:-1]
        self.lora_A = nn.Linear(in_features, self.experts * self.r, bias=False, dtype=torch.float32).weight
        self.lora_B = nn.Linear(self.experts * self.r, out_features, bias=False, dtype=torch.float32).weight
        if config.init_lora_weights is not False:
            with torch.no_grad():
                (gaussian if config.init_lora_weights == "gaussian" else kaiming)(self, nn.Module())  # type: ignore[arg-type]

    def delta(self) -> Tensor:
        """s·B_e A_e of every expert, in the shape of W, in float32 or better."""
        A = self.lora_A.view(self.experts, self.r, -1)
        B = self.lora_B.view(-1, self.r, self.experts).permute(2, 0, 1)  # (E, out, r)
        dW = self.scaling * (B @ A)
        dW = dW.mT if self.is_transposed else dW
        return dW if self.experts > 1 or self.is_transposed else dW[0]


class ParameterLoRA(Part):
    """The updates of one module's parameters, by the parameters' names."""

    def __init__(self, module: nn.Module, config: LoRAConfig, path: str, names: list[str]) -> None:
        super().__init__(module, config)
        is_transposed = bool(getattr(module, "is_transposed", False))  # transformers says so of an experts module
        self.factors = nn.ModuleDict(
            {name: ExpertFactors(module.get_parameter(name), config, f"{path}.{name}", is_transposed) for name in names}
        )

    def updates(self) -> dict[str, Tensor]:
        """ΔW by the parameter's name."""
        return {name: factors.delta() for name, factors in self.factors.items()}  # type: ignore[operator]

    def saved_tensors(self) -> dict[str, Tensor]:
        """PEFT wraps the module once for each parameter, and a wrapper's content is its base_layer."""
        tensors: dict[str, Tensor] = {}
        for depth, factors in enumerate(reversed(list(self.factors.values()))):
            inside = "base_layer." * depth
            tensors |= {f"{inside}{name}.weight": parameter for name, parameter in factors.named_parameters()}
        return tensors


def parameter_updates(model: nn.Module, config: AdapterConfig) -> dict[str, ParameterLoRA]:
    """The updates that `target_parameters` asks for, by the path of the module that has the parameters."""
    targets = getattr(config, "target_parameters", None)
    if not targets:
        return {}
    assert isinstance(config, LoRAConfig)
    if config.lora_dropout or config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
        raise InputError(
            "target_parameters takes no lora_dropout, no use_dora, and init_lora_weights True, False or 'gaussian'"
        )
    modules = modules_before_adapters(model)
    named = [f"{path}.{name}" for path, module in modules.items() for name in module._parameters]
    for target in targets:
        if not any(matches([target], path) for path in named):
            raise InputError(f"target_parameters: {target!r} matches no parameter; {nearest_names([target], named)}")
    found: dict[str, ParameterLoRA] = {}
    for path, module in modules.items():
        names = [name for name, _ in module.named_parameters(recurse=False) if matches(targets, f"{path}.{name}")]
        if not names:
            continue
        if kind_of(module) is not None:
            raise InputError(f"target_parameters matches the weight of the layer {path}: name it in target_modules")
        for name in names:
            if module.get_parameter(name).dim() not in (2, 3):
                shape = tuple(module.get_parameter(name).shape)
                raise InputError(f"target_parameters matches {path}.{name} of shape {shape}, which is not 2D or 3D")
        found[path] = ParameterLoRA(module, config, path, names)
    return found
