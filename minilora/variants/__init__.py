"""The variants of LoRA, one file each; importing this package registers them all."""

from minilora.variants import dora, ia3, loftq, loha, lokr, lora_fa, lora_plus, olora, orthogonal, pissa

__all__ = ["dora", "ia3", "loftq", "loha", "lokr", "lora_fa", "lora_plus", "olora", "orthogonal", "pissa"]
