"""The variants of LoRA, one file each; importing this package registers them all."""

from minilora.variants import dora

__all__ = ["dora"]
