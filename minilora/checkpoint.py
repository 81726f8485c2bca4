"""load: a model and its tokenizer from a known name, a folder, a GGUF file or the Hugging Face Hub.

The model is built without memory; then one tensor at a time is read, checked, quantized or cast, and put in its
place, so that the full-precision model is never whole in memory.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from minilora.errors import InputError
from minilora.linear4bit import NF4Linear
from minilora.model import ModelConfig, Transformer
from minilora.nf4 import quantize as quantize_nf4

if TYPE_CHECKING:
    from minilora.tokenizer import Tokenizer


class Checkpoint(Protocol):
    """What a file format offers: a configuration, and tensors by Hugging Face's names, read one by one."""

    config: ModelConfig

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor: ...
    def where(self, name: str) -> str: ...


def load(
    name_or_path: str | Path,
    *,
    quantize: Literal["nf4"] | None = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> tuple[Transformer, "Tokenizer"]:
    """Load a model in evaluation mode, frozen, and its tokenizer."""
    from minilora.fetch import MODELS, model_file
    from minilora.gguf_checkpoint import GGUFCheckpoint
    from minilora.tokenizer import Tokenizer

    path = model_file(str(name_or_path)) if str(name_or_path) in MODELS else Path(name_or_path)
    if path.suffix != ".gguf":
        raise InputError(f"{path}: only GGUF so far")
    checkpoint = GGUFCheckpoint(path)
    model = assemble(checkpoint, quantize == "nf4", double_quant, block_size, dtype, torch.device(device))
    return model, Tokenizer.from_gguf(path)


def assemble(
    checkpoint: Checkpoint,
    quantize: bool,
    double_quant: bool,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Transformer:
    """The checkpoint's model in evaluation mode, frozen: linear layers inside the blocks in NF4, the rest in dtype."""
    with torch.device("meta"):
        model = Transformer(checkpoint.config)
    check_names_and_shapes(checkpoint, model)
    for path, module in list(model.named_modules()):
        tensors = {name: read_tensor(checkpoint, f"{path}.{name}") for name in own_tensors(model, path, module)}
        if quantize and isinstance(module, nn.Linear) and path.startswith("model.layers."):
            weight = tensors["weight"].to(device)
            q = quantize_nf4(weight, block_size, double_quant, name=checkpoint.where(f"{path}.weight"))
            bias = tensors["bias"].to(device, dtype) if "bias" in tensors else None
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, NF4Linear.from_quantized(q, bias, compute_dtype=dtype))
        else:
            for name, tensor in tensors.items():
                # copy: the values may lie in a mapped file
                setattr(module, name, nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False))
    model.tie_weights()
    return model.eval()


def own_tensors(model: Transformer, path: str, module: nn.Module) -> Iterator[str]:
    """Names of the parameters of this very module that are to be filled; a tied head has none of its own."""
    if not (path == "lm_head" and model.config.tie_word_embeddings):
        yield from dict(module.named_parameters(recurse=False))


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of the checkpoint; InputError if it is not floating point or holds NaN or infinity."""
    tensor = checkpoint.read(name)
    if not tensor.is_floating_point():
        raise InputError(f"{checkpoint.where(name)} holds {tensor.dtype}, not floating-point weights")
    if not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise InputError(f"{checkpoint.where(name)} holds NaN or infinity")
    return tensor


def check_names_and_shapes(checkpoint: Checkpoint, model: Transformer) -> None:
    """InputError for the first tensor that is missing, too many or of another shape than the configuration says."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    present = set(checkpoint.names())
    for name in expected:
        if name not in present:
            raise InputError(f"{checkpoint.where(name)} is missing")
    for name in sorted(present - set(expected)):
        raise InputError(f"{checkpoint.where(name)} has no place in a {checkpoint.config.model_type} model")
    for name, shape in expected.items():
        if checkpoint.shape(name) != shape:
            raise InputError(f"{checkpoint.where(name)} has shape {checkpoint.shape(name)}, not {shape}")
