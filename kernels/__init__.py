"""Triton kernels for NF4, installed as `minilora.kernels`: a ladder, each step a file that stands for itself.

    codes        what all share: a byte to its two values, the absmax of a block
    dequantize   NF4 to dense, absmax included, in one pass
    quantize     dense to NF4
    gemv         y = W x, one token at a time
    matmul       y = x W^T (+ bias) (+ LoRA) for few rows of x
    backward     g_x = g_y W
    aot          all of them compiled without a GPU: registers, spills, shared memory

No GPU has run them yet: Triton's interpreter has, and they compile without spills. Until one has, NF4Linear uses the
plain PyTorch path on every device. Needs Triton (`pip install minilora[gpu]`), which nothing else in minilora does.
"""
