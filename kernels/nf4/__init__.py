"""Triton kernels for NF4, installed as `minilora.kernels`: a ladder, each step a file that stands for itself.

Read codes.py first.

    codes        what all share: a byte to its two values, the absmax of a block
    dequantize   NF4 to dense, absmax included, in one pass
    quantize     dense to NF4
    gemv         y = W x, one token at a time
    matmul       y = x W^T (+ bias) (+ LoRA) for few rows of x
    backward     g_x = g_y W
    ops          dequantize, quantize, matmul and backward as PyTorch operators
    proof        is a kernel right on the device at hand?
    aot          all of them compiled without a GPU: registers, spills, shared memory

No GPU has run them yet, only Triton's interpreter; they compile for sm_80, sm_90 and sm_100 without spills. NF4Linear
uses one where it has shown, on the GPU at hand, that it is right and faster than PyTorch's own operations
(minilora/nf4/kernel_trials.py). Needs Triton (`pip install minilora[gpu]`), which nothing else in minilora does.

The folder above has no __init__.py: as a package it would hide PyPI's `kernels`, which bitsandbytes and transformers
import where it is installed, from a Python that is started in the repository's root.
"""
