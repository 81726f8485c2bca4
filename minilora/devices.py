"""Devices beside the CPU: which there is, how much of its memory was taken, and what not every one can do.

"cuda" is NVIDIA's and, in PyTorch for ROCm, AMD's; "xpu" is Intel's, "mps" Apple's. Nobody has run minilora on the last
two: what is known of them stands in PyTorch's source (tests/stand_in_device.py has it, and plays them).
"""

import torch

__all__ = ["default_device", "device_for_float64", "peak_memory"]


def default_device() -> str:
    """The type of the GPU that PyTorch can use here, or "cpu"."""
    for kind, available in (
        ("cuda", torch.cuda.is_available),
        ("xpu", torch.xpu.is_available),
        ("mps", torch.backends.mps.is_available),
    ):
        if available():
            return kind
    return "cpu"


def device_for_float64(device: torch.device) -> torch.device:
    """Where to compute in float64 what is on this device: there, or on the CPU, since MPS has none, nor has Arc A."""
    return torch.device("cpu") if device.type in ("mps", "xpu") else device


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that tensors have taken on a GPU; on MPS, which keeps no count, what the process holds there now.

    None on a CPU.
    """
    if device.type in ("cuda", "xpu"):
        return int(torch.get_device_module(device).max_memory_allocated(device))
    return torch.mps.driver_allocated_memory() if device.type == "mps" else None
