"""What adapters a model has, and in which state they are."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from minilora.adapters.adapter import Adapter
from minilora.adapters.attach import adapter_names
from minilora.adapters.targets import adapted_layers


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter of a model; of what differs between its layers there is all of it."""

    method: str
    """PEFT's name: "LORA", "LOHA", …"""
    layers: int
    """how many layers and modules carry it"""
    parameters: int
    """numbers in it; what a tied pair shares counts once"""
    trainable: int
    """of those, the ones that train now"""
    active: bool
    """whether it is among those that act, unless adapters are switched off"""
    merged: bool
    """whether it is in the weights"""
    enabled: bool
    """False inside `disable_adapters`"""
    dtypes: tuple[torch.dtype, ...]
    """of its parameters"""
    devices: tuple[torch.device, ...]
    """of its parameters"""


def status(model: nn.Module) -> dict[str, AdapterStatus]:
    """Tell the state of every adapter on a model.

    Args:
        model: any module.

    Returns:
        An `AdapterStatus` by the adapter's name; none for a model without adapters.
    """
    layers = adapted_layers(model).values()
    found = {}
    for name in adapter_names(model):
        carrying = [layer for layer in layers if name in layer.adapters]
        adapters = [cast(Adapter, layer.adapters[name]) for layer in carrying]
        parameters = {parameter for adapter in adapters for parameter in adapter.parameters()}
        found[name] = AdapterStatus(
            method=adapters[0].config.peft_type,
            layers=len(carrying),
            parameters=sum(parameter.numel() for parameter in parameters),
            trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            active=any(name in layer.active for layer in carrying),
            merged=any(name in layer.merged for layer in carrying),
            enabled=all(layer.enabled for layer in carrying),
            dtypes=_all_of(parameter.dtype for parameter in parameters),
            devices=_all_of(parameter.device for parameter in parameters),
        )
    return found


def _all_of(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(sorted(set(values), key=str))
