"""What updates the adapter: its parameters in float32, and AdamW in one of its kinds.

    m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²                          the moments of the gradient
    p ← p − η λ p − η m̂ / (√v̂ + ε)                                               m̂, v̂: divided by 1 − βᵗ

Loshchilov & Hutter, arXiv 1711.05101, algorithm 2. bitsandbytes keeps m and v in 8 bits, with a scale for each block of
256 numbers (Dettmers et al., arXiv 2110.02861): 2 bytes a parameter in the place of 8; "paged", in memory that moves
to the CPU where the GPU's is short (Dettmers et al., arXiv 2305.14314, section 3).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters import adapter_names, adapter_parameters, trainable_parameters
from minilora.errors import InputError
from minilora.training.config import TrainConfig
from minilora.training.lora_fa import LoRAFA, loras_to_freeze
from minilora.training.lora_plus import parameter_groups

# One kernel for the whole update, in a third of the time: for SmolLM2's 420 matrices of r = 16, 5 ms on a core for 15.
FUSED_ON = ("cpu", "cuda")


def parameters_to_train(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their path in the model, whether it is active or not.

    Raises InputError where something beside the model's adapters is trainable.
    """
    own = {id(parameter) for parameter in adapter_parameters(model, adapter).values()}
    of_adapters = {id(p) for name in adapter_names(model) for p in adapter_parameters(model, name).values()}
    if others := [name for name, p in trainable_parameters(model).items() if id(p) not in of_adapters]:
        raise InputError(
            f"{others[0]} is trainable, but the folder of adapter {adapter!r} has no place for it: freeze it first"
        )
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def make_masters(parameters: Iterable[nn.Parameter]) -> None:
    """Make them float32: a small update added to a bfloat16 weight is rounded away."""
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def check_optimizer(model: nn.Module, adapter: str, config: TrainConfig) -> None:
    """Raise InputError where `make_optimizer` would; nothing is changed."""
    if config.lora_fa:
        loras_to_freeze(model, adapter)
    elif config.optimizer != "adamw":
        _bitsandbytes_class(config.optimizer, next(iter(adapter_parameters(model, adapter).values())).device)


def make_optimizer(model: nn.Module, adapter: str, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW of the configured kind, or what LoRA+ or LoRA-FA make of it; without a gradient from before.

    Every group keeps its highest learning rate as `initial_lr`. Raises InputError where bitsandbytes is asked for and
    is not there, or cannot work on the model's device, and for an adapter that LoRA-FA cannot train.
    """
    parameters = [p for p in adapter_parameters(model, adapter).values() if p.requires_grad]
    device = parameters[0].device
    lr, ratio = config.learning_rate, config.loraplus_lr_ratio
    settings: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    groups: list[Any] = [{"params": parameters, "lr": lr}]
    if ratio is not None:
        groups = parameter_groups(model, adapter, lr=lr, lr_ratio=ratio, weight_decay=config.weight_decay)
    optimizer: torch.optim.Optimizer
    if config.optimizer != "adamw":
        optimizer = _bitsandbytes_class(config.optimizer, device)(groups, **settings)
    elif config.lora_fa:
        optimizer = LoRAFA(model, adapter, lr=lr, fused=device.type in FUSED_ON, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, fused=device.type in FUSED_ON, **settings)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    optimizer.zero_grad()  # whatever a backward pass before left there
    return optimizer


def _bitsandbytes_class(name: str, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    paged = name == "paged_adamw_8bit"
    if device.type != "cuda" and (paged or device.type != "cpu"):
        raise InputError(f'optimizer="{name}" does not work on {device.type}: choose {"adamw_8bit or " * paged}adamw')
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    except ImportError:
        raise InputError(f'optimizer="{name}" needs bitsandbytes: pip install bitsandbytes') from None
    return PagedAdamW8bit if paged else AdamW8bit  # type: ignore[no-any-return]


# --- optimizer state, in a checkpoint ---------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What it keeps of each parameter, as tensors by `<key>.<name>`; a count that is no tensor as a 0-dim int64."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if key.startswith("qmap"):  # of the 8-bit codes: one tensor for all, which no file may hold twice
                value = value.clone()
            tensors[f"{key}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_state` gave, bit for bit and on the parameters' devices; the settings stay."""
    in_order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = {parameter: i for i, parameter in enumerate(in_order)}
    state: dict[int, dict[str, Tensor | int]] = defaultdict(dict)
    for path, value in saved.items():
        key, _, name = path.partition(".")
        state[indices[parameters[name]]][key] = int(value) if value.dtype == torch.int64 else value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    if getattr(optimizer, "is_paged", False):  # bitsandbytes' load_state_dict gives ordinary memory
        for parameter, of_parameter in optimizer.state.items():
            for key in ("state1", "state2"):
                buffer = optimizer.get_state_buffer(parameter, dtype=of_parameter[key].dtype)  # type: ignore[attr-defined]
                of_parameter[key] = buffer.copy_(of_parameter[key])
