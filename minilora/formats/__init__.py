"""Every file that comes in or goes out.

Read load.py first. safetensors.py reads checkpoints, gguf/ reads and writes them, hub.py and fetch.py bring them;
save_pretrained.py writes a Hugging Face folder, peft.py reads and writes adapters, ollama.py writes a Modelfile. All
that is written is written whole or not at all: atomic.py.
"""

from minilora.formats.atomic import atomic_files
from minilora.formats.fetch import BFCL, model_file, wheel_file
from minilora.formats.load import load, locate, usable
from minilora.formats.peft import load_adapter, save_adapter, swap_adapter
from minilora.formats.safetensors import read_config
from minilora.formats.save_pretrained import save_pretrained, saved_dtype

__all__ = [
    "BFCL",
    "atomic_files",
    "load",
    "load_adapter",
    "locate",
    "model_file",
    "read_config",
    "save_adapter",
    "save_pretrained",
    "saved_dtype",
    "swap_adapter",
    "usable",
    "wheel_file",
]
