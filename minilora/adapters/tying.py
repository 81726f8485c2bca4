"""Layers with one weight, embeddings and an output head: in training, in the folder and after a merge.

trained apart       each has what it was given, as if they were not tied; merged, they are several weights
ensure_weight_tying what trains of one trains of all as one: ΔW of the head = (ΔW of the embedding)ᵀ
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minilora.adapters.adapter import Adapter, AdapterConfig
from minilora.adapters.layer_kinds import EmbeddingKind
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.targets import (
    ensures_tying,
    input_embedding,
    layers_to_tie,
    modules_before_adapters,
    output_head,
    tied_layers,
)
from minilora.errors import InputError
from minilora.models import ModelConfig


def check_tie(model: nn.Module, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> None:
    """Raises InputError where ensure_weight_tying has nothing to tie."""
    if not ensures_tying(config):
        return
    tied = tied_layers(model)
    if not tied:
        raise InputError("ensure_weight_tying: no layer of the model shares the embedding's weight")
    if tied[-1] not in adapters:
        raise InputError(f"ensure_weight_tying: neither {' nor '.join(tied)} is named for training")


class TiedLoRA(Adapter):
    """The LoRA of a layer tied to an embedding, without parameters of its own: it has the embedding's.

    A head's ΔW (tokens, dim) is the embedding's, transposed; another embedding's is the same.
    """

    def __init__(self, layer: nn.Module, path: str, config: LoRAConfig, embedding: LoRA) -> None:
        super().__init__(layer, config, path)
        if self.config.init_lora_weights not in (True, False, "gaussian"):
            raise InputError(
                f"{path}: init_lora_weights={self.config.init_lora_weights!r} is not for what the embedding shares with"
                " the head; use True"
            )
        self.dropout = nn.Dropout(config.lora_dropout)
        self._embedding = [embedding]  # a list, so that the embedding's parameters are not found here too
        self.is_transposed = not isinstance(self.kind, EmbeddingKind)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B; of a head A (r, dim) = B_eᵀ and B (tokens, r) = A_eᵀ."""
        A, B = self._embedding[0].factors()
        return (B.T, A.T) if self.is_transposed else (A, B)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        A, B = self.factors()
        dtype = x.dtype if x.is_floating_point() else A.dtype
        kept = self.dropout(x) if x.is_floating_point() else x
        sB = (self._embedding[0].scaling * B).to(dtype)
        return self.kind.pointwise(self.kind.apply(kept, A.to(dtype)), sB, add)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        return list(self._embedding[0].parameters())

    def delta(self) -> Tensor:
        delta = self._embedding[0].delta()
        return delta.T if self.is_transposed else delta

    def saved_tensors(self) -> dict[str, Tensor]:
        A, B = self.factors()
        names = ("lora_A.weight", "lora_B.weight") if self.is_transposed else ("lora_embedding_A", "lora_embedding_B")
        return super().saved_tensors() | dict(zip(names, (A, B), strict=True))


def tie_updates(model: nn.Module, config: AdapterConfig, adapters: dict[str, Adapter]) -> None:
    """With ensure_weight_tying, put the embedding's own LoRA on what is tied to it in the place of another.

    The factors start as the head's would: with the same seed at PEFT's numbers, in another order.
    """
    tied = [path for path in layers_to_tie(model, config) if path in adapters]
    for path in tied:
        if type(adapters[path]) is not LoRA:
            kind = type(adapters[path]).__name__
            raise InputError(f"ensure_weight_tying is for plain LoRA, not for the {kind} of {path}")
    modules = modules_before_adapters(model)
    for path in tied[1:]:
        embedding, own = adapters[tied[0]], adapters[path]
        assert isinstance(embedding, LoRA) and isinstance(own, LoRA)
        adapters[path] = TiedLoRA(modules[path], path, own.config, embedding)
        if not isinstance(own.kind, EmbeddingKind):
            with torch.no_grad():
                embedding.lora_A.copy_(own.lora_B.T)
                embedding.lora_B.copy_(own.lora_A.T)


def settle_ties(model: nn.Module) -> None:
    """Tie again weights that a merge has left equal; where tied ones differ now, untie all and have the config say so.

    The one flag of a transformers model is for all of them: BART's ties the embeddings of encoder and decoder along
    with the head. It is set in the configuration that there is, since to build another one would run what its class
    does at construction.
    """
    config = getattr(model, "config", None)
    embedding, head = input_embedding(model), output_head(model)
    pair = {f"{head}.weight": f"{embedding}.weight"} if embedding and head else {}
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", pair)
    if not getattr(config, "tie_word_embeddings", False) or not ties:
        return
    weights = {target: (model.get_parameter(target), model.get_parameter(source)) for target, source in ties.items()}
    if all(torch.equal(weight, of_source) for weight, of_source in weights.values()):
        _set(model, {target: of_source for target, (_, of_source) in weights.items()})
        return
    if isinstance(config, ModelConfig):  # which is frozen
        model.config = dataclasses.replace(config, tie_word_embeddings=False)  # type: ignore[assignment]
        return
    shared = [target for target, (weight, of_source) in weights.items() if weight is of_source]
    _set(model, {target: nn.Parameter(weights[target][0].clone(), requires_grad=False) for target in shared})
    model.all_tied_weights_keys = {}  # type: ignore[assignment]
    for module in model.modules():  # those inside may have a configuration, and a flag, of their own
        if getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            module.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _set(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for path, parameter in parameters.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, parameter)
