"""The variants of LoRA, one file each; importing this package registers them all."""

from minilora.variants import dora, ia3, lora_fa, lora_plus

__all__ = ["dora", "ia3", "lora_fa", "lora_plus"]
