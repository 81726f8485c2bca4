"""Frozen weights in four bits: the NF4 data type, and the linear layer that computes with it.

Read codec.py first (the table, quantize, dequantize, double quantization), then linear.py. What decides between PyTorch
and the Triton kernels of kernels/nf4/ is dispatch.py, by the trials of kernel_trials.py
(on kernel_device.py; what they found is kept by kernel_verdicts.py). On a CPU, scratch.py has the
memory that dequantization works in, and kept_weights.py keeps dequantized weights where memory allows. bitsandbytes.py
reads and writes its state-dict form; rounding.py is the rounding of a merge.
"""

from minilora.nf4 import bitsandbytes, codec
from minilora.nf4.codec import QuantizedTensor, code, dequantize, dequantize_absmax, dynamic_map, quantize
from minilora.nf4.dispatch import has_triton, quantize_weight, trials, trials_folder, weight_to_save
from minilora.nf4.kept_weights import keeping_weights, weights_that_fit
from minilora.nf4.kernel_device import Kind
from minilora.nf4.kernel_trials import MOST_TRIED, Trials
from minilora.nf4.linear import NF4Linear, linear_onto, product, product_with_low_rank
from minilora.nf4.rounding import round_to_nf4

__all__ = [
    "Kind",
    "MOST_TRIED",
    "NF4Linear",
    "QuantizedTensor",
    "Trials",
    "bitsandbytes",
    "code",
    "codec",
    "dequantize",
    "dequantize_absmax",
    "dynamic_map",
    "has_triton",
    "keeping_weights",
    "linear_onto",
    "product",
    "product_with_low_rank",
    "quantize",
    "quantize_weight",
    "round_to_nf4",
    "trials",
    "trials_folder",
    "weight_to_save",
    "weights_that_fit",
]
