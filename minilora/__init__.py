"""LoRA and QLoRA from scratch: small enough to read, exact enough to trust, fast enough to use."""

from typing import TYPE_CHECKING, Any

from minilora import nf4, variants
from minilora.adapters import (
    LoRAConfig,
    LoRALinear,
    adapter_names,
    adapters_for_rows,
    add_adapter,
    after_step,
    combine_adapters,
    delete_adapter,
    disable_adapters,
    merge,
    regularization,
    scale_adapter,
    set_adapter,
    status,
    trainable_parameters,
    unload,
    unmerge,
)
from minilora.data import load_rows, mix_rows, show_example, split_rows
from minilora.errors import InputError
from minilora.evaluation import compare, evaluate, general_ability, generate
from minilora.formats import load, load_adapter, save_adapter, save_pretrained, swap_adapter
from minilora.merging import merge_report, merge_to_lora, merge_to_nf4
from minilora.nf4 import NF4Linear
from minilora.training import TrainConfig, language_model_loss, train
from minilora.variants import AdaLoRAConfig, IA3Config, LoHaConfig, LoKrConfig, VeRAConfig

if TYPE_CHECKING:
    from minilora.formats.gguf import save_adapter_gguf, save_gguf

__version__ = "0.1.0"

__all__ = [
    # layers and configurations
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
    "scale_adapter",
    "status",
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
    "mix_rows",
    "split_rows",
    "show_example",
    "load_adapter",
    "swap_adapter",
    "save_adapter",
    "save_pretrained",
    "save_gguf",
    "save_adapter_gguf",
    # use
    "TrainConfig",
    "train",
    "language_model_loss",
    "generate",
    "evaluate",
    "compare",
    "general_ability",
    "InputError",
]


def __getattr__(name: str) -> Any:
    """save_gguf and save_adapter_gguf, when they are first asked for: with them comes the gguf package."""
    if name in ("save_gguf", "save_adapter_gguf"):
        from minilora.formats import gguf

        return getattr(gguf, name)
    raise AttributeError(f"module 'minilora' has no attribute {name!r}")
