"""Tied pairs: an embedding and an output head with one weight, in training, in the folder and after a merge.

trained apart       each has what it was given, as if they were not tied; merged, they are two weights
ensure_weight_tying what trains of one trains of both as one: ΔW of the head = (ΔW of the embedding)ᵀ
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minilora.adapters.adapter import Adapter, AdapterConfig
from minilora.adapters.lora import LoRA
from minilora.adapters.targets import (
    ensures_tying,
    input_embedding,
    modules_before_adapters,
    output_head,
    pair_to_tie,
    tied_pair,
)
from minilora.errors import InputError
from minilora.models import ModelConfig


def check_tie(model: nn.Module, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> None:
    """Raises InputError where ensure_weight_tying has nothing to tie."""
    if not ensures_tying(config):
        return
    pair = tied_pair(model)
    if pair is None:
        raise InputError("ensure_weight_tying: the model has no output head that shares the embedding's weight")
    if pair[1] not in adapters:
        raise InputError(f"ensure_weight_tying: neither {pair[0]} nor {pair[1]} is named for training")


class TiedLoRA(Adapter):
    """The LoRA of a tied head, without parameters of its own: ΔW (tokens, dim) is the embedding's, transposed.

    The factors start as the head's would: with the same seed at PEFT's numbers, in another order.
    """

    def __init__(self, layer: nn.Module, path: str, head: LoRA, embedding: LoRA) -> None:
        super().__init__(layer, head.config, path)
        if self.config.init_lora_weights not in (True, False, "gaussian"):
            raise InputError(
                f"{path}: init_lora_weights={self.config.init_lora_weights!r} is not for what the embedding shares with"
                " the head; use True"
            )
        self.dropout = head.dropout
        self._embedding = [embedding]  # a list, so that the embedding's parameters are not found here too
        with torch.no_grad():
            embedding.lora_A.copy_(head.lora_B.T)
            embedding.lora_B.copy_(head.lora_A.T)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, dim) = B_eᵀ and B (tokens, r) = A_eᵀ."""
        A, B = self._embedding[0].factors()
        return B.T, A.T

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        A, B = self.factors()
        sB = (self._embedding[0].scaling * B).to(x.dtype)
        return self.kind.pointwise(self.kind.apply(self.dropout(x), A.to(x.dtype)), sB, add)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        return list(self._embedding[0].parameters())

    def delta(self) -> Tensor:
        return self._embedding[0].delta().T

    def saved_tensors(self) -> dict[str, Tensor]:
        A, B = self.factors()
        return super().saved_tensors() | {"lora_A.weight": A, "lora_B.weight": B}


def tie_updates(model: nn.Module, config: AdapterConfig, adapters: dict[str, Adapter]) -> None:
    """With ensure_weight_tying, put the embedding's own LoRA on its head in the place of another."""
    pair = pair_to_tie(model, config)
    if pair is None or not adapters.keys() >= set(pair):
        return
    embedding, head = pair
    of_embedding, of_head = adapters[embedding], adapters[head]
    if type(of_embedding) is not LoRA or type(of_head) is not LoRA:
        raise InputError(f"ensure_weight_tying is for plain LoRA, not for the {type(of_head).__name__} of {head}")
    adapters[head] = TiedLoRA(modules_before_adapters(model)[head], head, of_head, of_embedding)


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
