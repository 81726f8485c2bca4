"""Devices beside the CPU: which there is, its peak memory, and where float64 is.

"cuda" is NVIDIA's and, in PyTorch for ROCm, AMD's; "xpu" is Intel's, "mps" Apple's. Nobody has run minilora on the last
two: what is known of them is from PyTorch's source (tests/helpers/stand_in_device.py simulates them).
"""

import torch


def default_device() -> str:
    """The type of the GPU that PyTorch can use here, or "cpu"."""
    available = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    return next((kind for kind, backend in available.items() if backend.is_available()), "cpu")


def device_for_float64(device: torch.device) -> torch.device:
    """The device itself, or the CPU for one that may lack float64, as MPS and Intel's Arc A do."""
    return torch.device("cpu") if device.type in ("mps", "xpu") else device


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that tensors have taken on a GPU (on MPS: what the process holds now); None on a CPU."""
    if device.type in ("cuda", "xpu"):
        return int(torch.get_device_module(device).max_memory_allocated(device))
    return torch.mps.driver_allocated_memory() if device.type == "mps" else None
