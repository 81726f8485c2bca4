"""The variants of LoRA, one file each; importing this package registers them all."""

from minilora.variants import (
    adalora,
    dora,
    eva,
    ia3,
    loftq,
    loha,
    lokr,
    lora_fa,
    lora_ga,
    lora_plus,
    olora,
    orthogonal,
    pissa,
    vera,
)

__all__ = [
    "adalora",
    "dora",
    "eva",
    "ia3",
    "loftq",
    "loha",
    "lokr",
    "lora_fa",
    "lora_ga",
    "lora_plus",
    "olora",
    "orthogonal",
    "pissa",
    "vera",
]
