"""save_adapter_gguf: a LoRA alone as a GGUF file, which llama.cpp puts on the GGUF file of its base model.

    <name>.lora_a (r, in), <name>.lora_b (out, r)      W' = W + adapter.lora.alpha / r · BA

as llama.cpp's convert_lora_to_gguf.py lays it out; the rows of q and k are those of the base file.
"""

from pathlib import Path

import gguf
from torch import Tensor, nn

from minilora.adapters import EmbeddingKind, LoRA, adapters_named
from minilora.errors import InputError
from minilora.formats.gguf.weights import ARCHITECTURES, gguf_names, in_gguf_order
from minilora.formats.gguf.writer import write_gguf
from minilora.models import ModelConfig, Transformer, require_own_model


def save_adapter_gguf(model: Transformer, file: str | Path, name: str = "default") -> None:
    """Write one LoRA as a GGUF file, in float32, for `llama-server --model base.gguf --lora file`.

    The base file is that of the model which the LoRA was trained on: `save_gguf` inside `disable_adapters`. PiSSA,
    OLoRA and the like become the plain LoRA of twice the rank that they equal; what differs from the file's one scale,
    such as rsLoRA or another alpha for a layer, is multiplied into B.

    Args:
        model: The model that the adapter is on.
        file: Where to write; its name ends in .gguf.
        name: Which adapter.

    Raises:
        InputError: naming the layer, for what this format cannot hold: another variant than LoRA, DoRA included, an
            adapter on an embedding or a tied head, biases, trained copies and token rows, a base that LoftQ made;
            merged into the model, `save_gguf` writes any of them. And for a model of transformers.
    """
    require_own_model(model, "with transformers, save_adapter(model, folder), then llama.cpp's convert_lora_to_gguf.py")
    loras = {path: _plain(path, adapter, model.config) for path, adapter in adapters_named(model, name).items()}
    # an alpha of 0 would mean "no alpha": s = 1
    alpha = float(next(iter(loras.values())).config.lora_alpha) or 1.0
    names = gguf_names(model.config)
    tensors: dict[str, Tensor] = {}
    for path, lora in loras.items():
        A, B = lora.lora_A.detach().float().cpu(), lora.lora_B.detach().float().cpu()
        if not (A.isfinite().all() and B.isfinite().all()):
            raise InputError(f"{path}: the LoRA holds NaN or infinity: its training had diverged; nothing was saved")
        # s·BA = alpha / r · (s r / alpha) B A: for a LoRA without exceptions the factor is 1
        B = (lora.scaling * lora.r / alpha) * B
        weight = f"{path}.weight"
        tensors[f"{names[weight]}.lora_a"] = A
        tensors[f"{names[weight]}.lora_b"] = in_gguf_order(model.config, weight, B)
    metadata = {
        gguf.Keys.General.TYPE: gguf.GGUFType.ADAPTER,
        gguf.Keys.General.FILE_TYPE: int(gguf.LlamaFileType.ALL_F32),
        gguf.Keys.Adapter.TYPE: "lora",
        gguf.Keys.Adapter.LORA_ALPHA: alpha,
    }
    plan = {name: (tuple(tensor.shape), "F32") for name, tensor in tensors.items()}
    write_gguf(Path(file), ARCHITECTURES[model.config.model_type], metadata, plan, tensors.items())


def _plain(path: str, adapter: nn.Module, config: ModelConfig) -> LoRA:
    """The LoRA whose parameters are A and B. Raises InputError for an adapter that is more, or something else."""
    merged = "merge it into the model instead: save_gguf"
    if type(adapter) is not LoRA:
        raise InputError(
            f"{path} has {type(adapter).__name__} on it, and a GGUF adapter holds plain LoRAs only; {merged}"
        )
    if adapter.bias is not None:
        raise InputError(f"{path} has a bias of the adapter's own, for which a GGUF adapter has no place; {merged}")
    if isinstance(adapter.kind, EmbeddingKind) or (path == "lm_head" and config.tie_word_embeddings):
        raise InputError(f"{path} is an embedding, or tied to one, on which llama.cpp puts no LoRA; {merged}")
    return adapter.as_plain()
