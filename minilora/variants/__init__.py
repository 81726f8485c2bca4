"""The variants of LoRA, one file each; importing this package registers them all.

Read olora.py first, the shortest start, then dora.py, which has another forward pass. LoRA+ and LoRA-FA, other steps of
the optimizer, are in training/; rsLoRA is in adapters/lora_config.py. docs/write_your_own_variant.md is the guide.
calibration/ is what those share that look at data.
"""

from minilora.variants import (
    adalora,
    dora,
    eva,
    ia3,
    loftq,
    loha,
    lokr,
    lora_bias,
    lora_ga,
    olora,
    orthogonal,
    pissa,
    vera,
)
from minilora.variants.adalora import AdaLoRAConfig
from minilora.variants.ia3 import IA3Config
from minilora.variants.loha import LoHaConfig
from minilora.variants.lokr import LoKrConfig
from minilora.variants.vera import VeRAConfig

__all__ = [
    "AdaLoRAConfig",
    "IA3Config",
    "LoHaConfig",
    "LoKrConfig",
    "VeRAConfig",
    "adalora",
    "dora",
    "eva",
    "ia3",
    "loftq",
    "loha",
    "lokr",
    "lora_bias",
    "lora_ga",
    "olora",
    "orthogonal",
    "pissa",
    "vera",
]
