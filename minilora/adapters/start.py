"""Where an adapter started, as its file can say it: ΔW = s·(BA − B₀A₀), and the file holds A and B.

    "pissa", "olora"            B₀A₀ follows from the base weights: who loads the file derives it again, as PEFT does
    "pissa_niter_4", "lora_ga"  B₀A₀ came from random numbers or from data, which the file does not hold
    a base in 4 bits            B₀A₀ follows from the dequantized weights, which other tools and precisions do not have
    "olora" on a Conv1D         PEFT decomposes W as it is stored, transposed, and so derives another B₀A₀

In the last three cases, or when asked to, the adapter is written as the plain LoRA of twice the rank that it equals:

    s·(BA − B₀A₀) = s·[B − B₀, B₀] [A; A − A₀]
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

from minilora.adapters.adapter import Adapter
from minilora.adapters.layer_kinds import NF4Kind, TransposedLinearKind
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError


def adapters_to_write(adapters: dict[str, Adapter], as_lora: bool) -> dict[str, Adapter]:
    """These adapters, by path, or plain LoRAs in their place, if asked for or if their start would be lost."""
    lost = any(
        not_derivable(getattr(adapter.config, "init_lora_weights", None)) or _why_it_differs(path, adapter)
        for path, adapter in adapters.items()
    )
    return _plain(adapters) if as_lora or lost else adapters


def _plain(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    for adapter in adapters.values():
        if type(adapter.config) is not LoRAConfig:
            raise InputError(f"as_lora: {adapter.config.peft_type} is another method, save it as it is")
    # what the adapter trains beside its updates stays as it is
    plain = {path: each.as_plain() if isinstance(each, LoRA) else copy.copy(each) for path, each in adapters.items()}
    configs = [each.config for each in plain.values() if isinstance(each, LoRA)]
    for each in plain.values():
        each.config = configs[0] if configs else each.config
    return plain


def not_derivable(init_lora_weights: Any) -> bool:
    """True for an init_lora_weights, ours or PEFT's, whose start cannot be had again from the base weights."""
    return re.fullmatch("pissa_niter_[0-9]+|lora_ga|corda", str(init_lora_weights)) is not None


def check_derived_start(adapters: Mapping[str, Adapter]) -> None:
    """Raises InputError where adapters built to be loaded would start from other weights than those of the file."""
    for path, adapter in adapters.items():
        if why := _why_it_differs(path, adapter):
            raise InputError(why)


def _why_it_differs(path: str, adapter: Adapter) -> str | None:
    """Why B₀A₀ derived here is another than what is derived elsewhere; None where it is the same."""
    if not isinstance(adapter, LoRA):
        return None
    init = adapter.config.init_lora_weights
    if adapter.start_A is not None and isinstance(adapter.kind, NF4Kind):
        return (
            f"init_lora_weights={init!r} starts from the full weights, and {path} is in"
            " 4 bits: load the model without quantize=, and from there save_adapter(..., as_lora=True)"
        )
    if init == "olora" and isinstance(adapter.kind, TransposedLinearKind):
        return (
            f"init_lora_weights='olora' on {path}, a Conv1D, whose weight PEFT decomposes transposed: the start is"
            " not OLoRA's; merge the adapter where it was trained, with PEFT's merge_and_unload()"
        )
    return None
