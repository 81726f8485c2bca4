"""`minilora kernels`: what is known of the NF4 kernels on this GPU; tried for a model's shapes; forgotten."""

import os

import torch
from rich.console import Console
from rich.table import Table

from minilora.errors import InputError
from minilora.formats import locate, read_config, usable
from minilora.formats.gguf import GGUFCheckpoint
from minilora.models import ModelConfig
from minilora.nf4 import MOST_TRIED, Kind, Trials, has_triton, trials, trials_folder
from minilora.progress import with_progress


def show(device: str) -> None:
    """Print which kernels this device uses, and by how much each wins or loses, or why it uses none."""
    console, known = Console(), trials(usable(device))
    if not isinstance(known, Trials):
        console.print(_all_or_none(device, known), highlight=False, soft_wrap=True)
        return
    about = known.verdicts.device
    table = Table(title=f"NF4 kernels on {about['GPU']}", title_justify="left")
    for column in ("kernel", "weight", "times as fast as PyTorch's way, by rows of x"):
        table.add_column(column)
    for kind, fault in sorted(known.verdicts.kinds.items()):
        if fault:
            table.add_row(kind, "", f"not used: {fault}")
        for key, rows in sorted(known.verdicts.times.items()):
            of_kind, _, shape = key.rpartition(", ")
            if of_kind == kind and not fault:
                ratios = (f"{M}: {pytorch / kernel:.2f}" for M, (kernel, pytorch) in sorted(rows.items()))
                table.add_row(kind, shape, "   ".join(ratios))
    if table.row_count:
        console.print(table)
        console.print("Above 1 the kernel is used, and with fewer rows; below 1 PyTorch's way, and with more.")
    else:
        console.print(f"No kernel has been tried on {about['GPU']} yet: that happens when one could first be used.")
    console.print(", ".join(f"{part} {value}" for part, value in about.items()), highlight=False)
    console.print(str(known.verdicts.path), highlight=False, soft_wrap=True)


def warm(model: str, dtype: torch.dtype, device: str) -> None:
    """Try every kernel for the shapes of a model's linear layers, as ml.load quantizes them, and for all rows of x.

    Raises InputError for a model that ml.load would not know, and on a device that tries none.
    """
    known = trials(usable(device))
    if not isinstance(known, Trials):
        raise InputError(f"there is nothing to warm: {_all_or_none(device, known)}")
    rows = [2**i for i in range(MOST_TRIED.bit_length())]
    of_kernel = {"quantize": [1], "dequantize": [1], "gemv": [1], "matmul": rows[1:], "backward": rows}
    shapes = linear_shapes(_config(model))
    every = [(name, shape, M) for shape in shapes for name, several in of_kernel.items() for M in several]
    for name, shape, M in with_progress(every, len(every), "Trying the NF4 kernels"):
        if shape[1] % 64 == 0 or "quantize" in name:  # else blocks straddle rows: no fused kernel
            known.wins(Kind(name, dtype, 64, name != "quantize"), shape, M)


def clear() -> None:
    """Forget what every device has found."""
    for file in trials_folder().glob("*.json"):
        file.unlink(missing_ok=True)
    trials.cache_clear()


def linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """The (out_features, in_features) of the linear layers in a block, each once."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return list(dict.fromkeys([(q, hidden), (kv, hidden), (hidden, q), (inner, hidden), (hidden, inner)]))


def _config(model: str) -> ModelConfig:
    path = locate(model, ["config.json"])
    if path.is_dir():
        return ModelConfig.from_hf(read_config(path), source=str(path / "config.json"))
    return GGUFCheckpoint(path).config


def _all_or_none(device: str, all_are_used: bool) -> str:
    """Why a device tries no kernels."""
    if all_are_used:
        return "MINILORA_KERNELS is 'on': every kernel is used, untried"
    if os.environ.get("MINILORA_KERNELS") == "off":
        return "MINILORA_KERNELS is 'off': NF4Linear uses PyTorch's own operations"
    if not device.startswith("cuda"):
        why = f"the NF4 kernels are for CUDA and ROCm GPUs, and the device is {device}"
    elif not has_triton():
        why = "Triton 3.6 or newer is not installed (pip install minilora[gpu])"
    else:
        why = "minilora.kernels is not installed, or runs in Triton's interpreter"
    return f"{why}: NF4Linear uses PyTorch's own operations"
