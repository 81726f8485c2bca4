"""load: a model and its tokenizer from a known name, a folder, a GGUF file or the Hugging Face Hub.

    checkpoint on disk --one tensor--> checked --> NF4 or dtype --> its place in a model built without memory

At no time is the full-precision model whole in memory: beyond what is kept, one tensor and its temporaries.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from minilora.auto_dtype import auto_dtype, say_once, slower_than_float32
from minilora.errors import InputError
from minilora.formats.fetch import MODELS, model_file
from minilora.formats.hub import snapshot
from minilora.formats.safetensors import SafetensorsCheckpoint
from minilora.models import ModelConfig, Transformer
from minilora.nf4 import NF4Linear, QuantizedTensor, dequantize, quantize_weight
from minilora.progress import with_progress
from minilora.text import Tokenizer, read_tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}
WORTH_A_WARNING = 2.0  # times float32's time


class Checkpoint(Protocol):
    """What each file format offers: a configuration, and tensors by Hugging Face's names, read one by one."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...  # of its weights; bfloat16 where they are all in fewer bits
    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor | QuantizedTensor: ...
    def where(self, name: str) -> str: ...


def load(
    name_or_path: str | Path,
    *,
    quantize: Literal["nf4"] | None = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[Transformer, Tokenizer]:
    """Load a model, frozen and in evaluation mode, and its tokenizer.

    The dtype that "auto" came to is said once, on stderr.

    Args:
        name_or_path: "smollm2-135m-instruct"; a Hugging Face folder; a .gguf file; or a Hub id such as
            "HuggingFaceTB/SmolLM2-360M-Instruct".
        quantize: "nf4" makes the linear layers inside the blocks NF4Linear; a weight that the checkpoint already has
            in NF4 keeps its own block_size and absmax. None keeps all layers dense.
        double_quant: Whether the absmax values are quantized too, as in `nf4.quantize`.
        block_size: Weights per absmax, as in `nf4.quantize`.
        dtype: Of all that is not in NF4, and what NF4Linear computes in: "bfloat16", "float32", "float16", "float64" or
            the torch.dtype. "auto" is the fastest that suits the device: bfloat16; on processors without instructions
            for it float32, on such GPUs float16. `save_pretrained` writes the checkpoint's own dtype all the same.
        device: Where the model is put.

    Returns:
        The model and the tokenizer.

    Raises:
        InputError: for a checkpoint that is missing, damaged or not supported, naming file and tensor, and for a dtype
            or a device that cannot be used.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """
    if quantize not in ("nf4", None):
        raise InputError(f"quantize={quantize!r} is not supported; supported are 'nf4' and None")
    dtype_name = str(dtype).removeprefix("torch.")
    if dtype_name not in ("auto", *DTYPES):
        raise InputError(f"dtype={dtype!r} is not supported; supported are auto, {', '.join(DTYPES)}")
    device = usable(device)
    path = locate(name_or_path)
    checkpoint: Checkpoint
    if path.is_dir():
        checkpoint, tokenizer = SafetensorsCheckpoint(path), read_tokenizer(path)
    else:
        from minilora.formats.gguf import GGUFCheckpoint, read_gguf_tokenizer  # with it the gguf package

        checkpoint = GGUFCheckpoint(path)
        tokenizer = read_gguf_tokenizer(checkpoint.file.metadata)
    dtype = _compute_dtype(dtype_name, device)
    return assemble(checkpoint, quantize == "nf4", double_quant, block_size, dtype, device), tokenizer


def usable(device: torch.device | str) -> torch.device:
    """The device, once a tensor has been put on it: found out before the time it takes to read a model."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: this PyTorch was built without it
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device={str(device)!r} cannot be used here: {reason}") from None


def locate(name_or_path: str | Path, files: list[str] | None = None) -> Path:
    """The folder or GGUF file that is meant, fetched if need be; from the Hub only `files`, if some are named."""
    path, name = Path(name_or_path), str(name_or_path)
    if name in MODELS:
        return model_file(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise InputError(f"{path} is neither a .gguf file nor a Hugging Face folder; for a folder, name the folder")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix != ".gguf" and name[0] != ".":
        return snapshot(name, files)
    raise InputError(
        f"{name}: no such folder or file; give a folder, a .gguf file, a Hub id owner/name, "
        f"or a name known here: {', '.join(MODELS)}"
    )


def _compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name, for which "auto" leaves the choice to `auto_dtype`; warns of one that is slow here."""
    if name == "auto":
        choice = auto_dtype(device)
        say_once(f"the model computes in {choice}")
        return choice.dtype
    dtype = DTYPES[name]
    if device.type == "cpu" and dtype.itemsize == 2 and (times := slower_than_float32(dtype)) > WORTH_A_WARNING:
        say_once(f'a product in {name} takes {times:.0f} times as long as in float32 on this CPU: try dtype="auto"')
    return dtype


def assemble(
    checkpoint: Checkpoint,
    quantize: bool,
    double_quant: bool,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Transformer:
    """The checkpoint's model, frozen and in evaluation mode: linear layers inside the blocks in NF4 if asked for."""
    with torch.device("meta"):
        model = Transformer(checkpoint.config)
    _check_names_and_shapes(checkpoint, model)

    names = [name for name, _ in model.named_parameters()]
    for name in with_progress(names, len(names), "Loading the model", "tensors"):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if quantize and leaf == "weight" and isinstance(module, nn.Linear) and path.startswith("model.layers."):
            q = _read_nf4(checkpoint, name, block_size, double_quant, device)
            # without a bias, which is a name of its own and comes next
            model.set_submodule(path, NF4Linear.from_quantized(q, None, dtype).to(device))
        else:
            setattr(module, leaf, nn.Parameter(_read_dense(checkpoint, name, dtype, device), requires_grad=False))
    model.tie_weights()
    model.checkpoint_dtype = checkpoint.dtype
    return model.eval()


def _check_names_and_shapes(checkpoint: Checkpoint, model: Transformer) -> None:
    """InputError for the first tensor that is missing, has no place, or is not of the configuration's shape."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    present = set(checkpoint.names())
    for name, shape in expected.items():
        if name not in present:
            raise InputError(f"{checkpoint.where(name)} is missing")
        if checkpoint.shape(name) != shape:
            raise InputError(f"{checkpoint.where(name)} has shape {checkpoint.shape(name)}, config.json means {shape}")
    extra = present - set(expected)
    if "lm_head.weight" in extra:  # only where config.json ties it to the embedding: then it must be its copy
        extra.remove("lm_head.weight")
        head, embedding = checkpoint.read("lm_head.weight"), checkpoint.read("model.embed_tokens.weight")
        if not isinstance(head, Tensor) or not isinstance(embedding, Tensor) or not torch.equal(head, embedding):
            raise InputError(
                f"{checkpoint.where('lm_head.weight')} is not the embedding, though config.json ties them: "
                "set its tie_word_embeddings to false if the head is meant to be its own"
            )
    for name in sorted(extra):
        raise InputError(f"{checkpoint.where(name)} has no place in a {checkpoint.config.model_type} model")


def _read_nf4(
    checkpoint: Checkpoint, name: str, block_size: int, double_quant: bool, device: torch.device
) -> QuantizedTensor:
    """A tensor in NF4, quantized now unless the checkpoint has it so."""
    value = _read(checkpoint, name)
    if isinstance(value, QuantizedTensor):
        return value
    return quantize_weight(value.to(device), block_size, double_quant, name=checkpoint.where(name))


def _read_dense(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in `dtype`, in memory of its own."""
    value = _read(checkpoint, name)
    if isinstance(value, QuantizedTensor):
        return dequantize(value, dtype).to(device)
    if not torch.stack(torch.aminmax(value)).isfinite().all():
        raise InputError(f"{checkpoint.where(name)} holds NaN or infinity")
    return value.to(device, dtype, copy=True)


def _read(checkpoint: Checkpoint, name: str) -> Tensor | QuantizedTensor:
    value = checkpoint.read(name)
    if isinstance(value, Tensor) and value.dtype not in DTYPES.values():
        where = checkpoint.where(name)
        raise InputError(f"{where} is of type {value.dtype}; weights are float32, bfloat16, float16 or float64")
    return value
