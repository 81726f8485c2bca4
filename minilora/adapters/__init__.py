"""Adapters on a model: LoRA, the contract that every variant fulfils, and putting them on, off, and together.

Read lora.py first, then adapter.py (the contract), layer.py (a layer and its adapters), attach.py (add_adapter and what
follows) and merge.py; for_training.py is what a training loop asks. lora_config.py is LoRA's configuration and
initialization.py where A and B start. targets.py finds the layers, by default_targets.py where none is named;
trained_parts.py, parameter_lora.py and tying.py are what else can train. mixed_batch.py and combine.py are for many
adapters, scaling.py for less or more of one; fused_lora.py and gated_lora.py are products with a backward pass of their
own, start.py is what PEFT must be told of a start, status.py tells what a model has, and resizing.py what it cannot do.
"""

from minilora.adapters.adapter import (
    Adapter,
    AdapterConfig,
    Below,
    adapter_class,
    at_least_float32,
    config_class,
    register,
)
from minilora.adapters.attach import (
    BASE,
    adapter_names,
    adapters_named,
    add_adapter,
    attach,
    build_adapters,
    delete_adapter,
    disable_adapters,
    refuse_merged,
    refuse_switched_off,
    replace_adapters,
    set_adapter,
)
from minilora.adapters.combine import combine_adapters
from minilora.adapters.evaluating import evaluating, refuse_row_names
from minilora.adapters.for_training import (
    adapter_parameters,
    after_step,
    count_parameters,
    regularization,
    summed_regularization,
    trainable_parameters,
)
from minilora.adapters.initialization import kaiming, register_initialization, require_linear, weight_to_decompose
from minilora.adapters.layer import AdaptedLayer, LoRALinear
from minilora.adapters.layer_kinds import ConvKind, EmbeddingKind, NF4Kind, TransposedLinearKind, kind_of
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig, first_match
from minilora.adapters.merge import merge, unload, unmerge
from minilora.adapters.merged_weights import dense_tensors, layer_and_acting, layers_with_weights
from minilora.adapters.mixed_batch import adapters_for_rows
from minilora.adapters.scaling import scale_adapter
from minilora.adapters.start import adapters_to_write, check_derived_start, not_derivable
from minilora.adapters.status import AdapterStatus, status
from minilora.adapters.targets import (
    adapted_layers,
    find_targets,
    input_embedding,
    modules_before_adapters,
    name_of,
    output_head,
    tied_layers,
)
from minilora.adapters.trained_parts import Part, TrainedCopy

__all__ = [
    "AdaptedLayer",
    "Adapter",
    "AdapterConfig",
    "AdapterStatus",
    "BASE",
    "Below",
    "ConvKind",
    "EmbeddingKind",
    "LoRA",
    "LoRAConfig",
    "LoRALinear",
    "NF4Kind",
    "Part",
    "TrainedCopy",
    "TransposedLinearKind",
    "adapted_layers",
    "adapter_class",
    "adapter_names",
    "adapter_parameters",
    "adapters_for_rows",
    "adapters_named",
    "adapters_to_write",
    "add_adapter",
    "after_step",
    "at_least_float32",
    "attach",
    "build_adapters",
    "check_derived_start",
    "combine_adapters",
    "count_parameters",
    "config_class",
    "delete_adapter",
    "dense_tensors",
    "disable_adapters",
    "evaluating",
    "find_targets",
    "first_match",
    "input_embedding",
    "kaiming",
    "kind_of",
    "layer_and_acting",
    "layers_with_weights",
    "merge",
    "modules_before_adapters",
    "name_of",
    "not_derivable",
    "output_head",
    "refuse_merged",
    "refuse_row_names",
    "refuse_switched_off",
    "register",
    "register_initialization",
    "regularization",
    "replace_adapters",
    "require_linear",
    "scale_adapter",
    "set_adapter",
    "status",
    "summed_regularization",
    "tied_layers",
    "trainable_parameters",
    "unload",
    "unmerge",
    "weight_to_decompose",
]
