"""LoRA and QLoRA from scratch: small enough to read, exact enough to trust, fast enough to use."""

from minilora import nf4, variants
from minilora.adapted_layer import LoRALinear
from minilora.adapters import (
    adapter_names,
    add_adapter,
    after_step,
    delete_adapter,
    disable_adapters,
    merge,
    regularization,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge,
)
from minilora.checkpoint import load, save_pretrained
from minilora.combine import combine_adapters
from minilora.data import load_rows, show_example
from minilora.errors import InputError
from minilora.evaluate import compare, evaluate
from minilora.general_ability import general_ability
from minilora.generate import generate
from minilora.linear4bit import NF4Linear
from minilora.lora import LoRAConfig
from minilora.merge_nf4 import merge_to_lora, merge_to_nf4
from minilora.merge_report import merge_report
from minilora.mixed_batch import adapters_for_rows
from minilora.peft_format import load_adapter, save_adapter
from minilora.save_adapter_gguf import save_adapter_gguf
from minilora.save_gguf import save_gguf
from minilora.train import TrainConfig, train
from minilora.variants.adalora import AdaLoRAConfig
from minilora.variants.ia3 import IA3Config
from minilora.variants.loha import LoHaConfig
from minilora.variants.lokr import LoKrConfig
from minilora.variants.vera import VeRAConfig

__version__ = "0.1.0"

__all__ = [
    # layers
    "nf4",
    "NF4Linear",
    "LoRAConfig",
    "AdaLoRAConfig",
    "IA3Config",
    "LoHaConfig",
    "LoKrConfig",
    "VeRAConfig",
    "LoRALinear",
    "variants",
    # adapters on a model
    "add_adapter",
    "adapter_names",
    "set_adapter",
    "adapters_for_rows",
    "combine_adapters",
    "delete_adapter",
    "disable_adapters",
    "trainable_parameters",
    "regularization",
    "after_step",
    "merge",
    "unmerge",
    "merge_report",
    "merge_to_nf4",
    "merge_to_lora",
    "unload",
    # in and out
    "load",
    "load_rows",
    "show_example",
    "load_adapter",
    "save_adapter",
    "save_pretrained",
    "save_gguf",
    "save_adapter_gguf",
    # use
    "TrainConfig",
    "train",
    "generate",
    "evaluate",
    "compare",
    "general_ability",
    "InputError",
]
