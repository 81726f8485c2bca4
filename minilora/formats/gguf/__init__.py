"""GGUF, llama.cpp's format: reading a model and its tokenizer, writing a model or an adapter.

Read file.py first (the container), then weights.py. tokenizer.py and vocabulary.py go one way and the other;
save_model.py and save_adapter.py write.
"""

from minilora.formats.gguf.save_adapter import save_adapter_gguf
from minilora.formats.gguf.save_model import OutType, save_gguf
from minilora.formats.gguf.tokenizer import read_gguf_tokenizer
from minilora.formats.gguf.weights import GGUFCheckpoint

__all__ = [
    "GGUFCheckpoint",
    "OutType",
    "read_gguf_tokenizer",
    "save_adapter_gguf",
    "save_gguf",
]
