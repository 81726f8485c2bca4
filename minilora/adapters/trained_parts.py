"""What an adapter can have beside its updates of layers: biases, copies of whole modules, rows of embeddings.

    bias                      b of its own for a layer; on a layer without an update: OwnBias
    modules_to_save           TrainedCopy: the module is replaced by a copy that trains in full
    trainable_token_indices   TrainedRows: some rows of an embedding train, and the logits of a tied head follow
    ensure_weight_tying       what trains of tied layers, embeddings and head, trains as one: adapters/tying.py

PEFT trains biases in the base model itself; here the base model is never changed. All of it is float32, is switched and
merged with the adapter, and is found in it by `adapter_parameters`.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minilora.adapters.adapted_module import parameter_dtypes
from minilora.adapters.adapter import Adapter, AdapterConfig, Below, at_least_float32
from minilora.adapters.layer_kinds import EmbeddingKind, NF4Kind, kind_of
from minilora.adapters.targets import (
    embeddings_in_place_of,
    ensures_tying,
    find_modules_to_save,
    input_embedding,
    layers_to_tie,
    modules_before_adapters,
    nearest_names,
    tied_pair,
)
from minilora.adapters.tying import tie_updates
from minilora.errors import InputError
from minilora.nf4 import NF4Linear


def add_parts(model: nn.Module, config: AdapterConfig, adapters: dict[str, Adapter]) -> None:
    """Add to the adapters of the target layers, by path, what else the configuration trains."""
    modules = modules_before_adapters(model)
    tie_updates(model, config, adapters)
    copies = {path: TrainedCopy(modules[path], config, path) for path in find_modules_to_save(model, config)}
    if both := sorted(copies.keys() & adapters.keys()):
        raise InputError(f"{both[0]} is named in target_modules and, by its end, in modules_to_save")
    for path in (tied := [path for path in layers_to_tie(model, config) if path in copies])[1:]:
        copies[path].module.weight = copies[tied[0]].module.weight
    rows = _trained_rows(model, config)
    for path in rows:
        if path in adapters or path in copies:
            raise InputError(
                f"trainable_token_indices trains rows of {path}, which target_modules or modules_to_save names too"
            )
    biases = _own_biases(modules, config, adapters, copies)
    adapters |= copies | rows | biases


class Part(Adapter):
    """A trained part of the model that is not an update of a layer's weight; the layer may be any module."""

    any_module = True

    def updates(self) -> dict[str, Tensor]:
        """What it adds to parameters of the module, by name."""
        return {}


# --- biases ----------------------------------------------------------------------------------------------------------


class OwnBias(Part):
    """bias (out,): takes the place of b, in a layer or module that has no other adapter of this name."""

    additive = False
    changes_weight = False
    peft_base = ""

    def __init__(self, layer: nn.Module, config: AdapterConfig) -> None:
        super().__init__(layer, config)
        self.train_bias(layer)

    def transform(self, x: Tensor, below: Below, add: Tensor | None = None) -> Tensor:
        return below(x, add)  # it has the adapters' biases

    def merged_weight(self, W: Tensor) -> Tensor:
        return W

    def saved_tensors(self) -> dict[str, Tensor]:
        return {"bias": self.get_parameter("bias")}


def _own_biases(
    modules: Mapping[str, nn.Module],
    config: AdapterConfig,
    adapters: Mapping[str, Adapter],
    copies: Mapping[str, nn.Module],
) -> dict[str, Adapter]:
    """Give the adapters their biases; for "all" also what has a bias and no adapter, by path."""
    bias = getattr(config, "bias", "none")
    if bias == "none":
        return {}
    for path, adapter in adapters.items():
        adapter.train_bias(modules[path])
    if bias != "all":
        return {}
    inside_copies = tuple(f"{path}." for path in copies)
    found: dict[str, Adapter] = {}
    for path, module in modules.items():
        has_bias = isinstance(module._parameters.get("bias"), Tensor)
        if not has_bias or path in adapters or path in copies or path.startswith(inside_copies):
            continue
        found[path] = OwnBias(module, config)
    return found


# --- copies of whole modules -----------------------------------------------------------------------------------------


class TrainedCopy(Part):
    """module: a copy of the layer or module, all of it trained, that is called in its place.

    Parameters are float32; the copy computes in the dtype of the original. The copy of an NF4Linear is an nn.Linear.
    """

    additive = False
    replaces = True
    peft_base = "original_module."

    def __init__(self, layer: nn.Module, config: AdapterConfig, path: str) -> None:
        super().__init__(layer, config)
        for inside, module in layer.named_modules(prefix=path):
            if any(not parameter.is_floating_point() for parameter in module.parameters(recurse=False)):
                name = type(module).__name__
                raise InputError(
                    f"modules_to_save: of {inside}, a {name}, no copy can be trained: its weight is packed"
                )
        self.module = _dense(layer)
        for parameter in self.module.parameters():
            parameter.data = at_least_float32(parameter.data)

    def call(self, original: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with the copy's parameters, in the dtypes in which the original uses its own."""
        of_input = next((x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()), torch.float32)
        dtypes = parameter_dtypes(original, in_4_bits=of_input)
        parameters = dict(self.module.named_parameters())
        values = {key: parameter.to(dtypes[key]) for key, parameter in parameters.items()}
        if all(values[key] is parameter for key, parameter in parameters.items()):
            return self.module(*args, **kwargs)
        return functional_call(self.module, values, args, kwargs)

    def transform(self, x: Tensor, below: Below, add: Tensor | None = None) -> Tensor:
        y: Tensor = self.call(below.layer, x)
        return y if add is None else y + add

    def merged_weight(self, W: Tensor) -> Tensor:
        assert isinstance(self.module.weight, Tensor)
        return self.kind.stored(self.module.weight)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return getattr(self.module, "bias", None)

    def saved_tensors(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict(keep_vars=True))


def _dense(module: nn.Module) -> nn.Module:
    """A copy in which every NF4Linear has become an nn.Linear."""
    if isinstance(module, NF4Linear):
        bias = None if module.bias is None else module.bias.detach().clone()
        return NF4Kind(module).with_weight(module, module.dequantize(torch.float32), bias)
    module = copy.deepcopy(module)
    for path, inner in list(module.named_modules()):
        if isinstance(inner, NF4Linear):
            module.set_submodule(path, _dense(inner))
    return module


# --- rows of an embedding --------------------------------------------------------------------------------------------


class TrainedRows(Part):
    """rows (tokens, dim): take the place of the rows `ids` of an embedding, or of a head's weight, tied or not.

    `tied_to` is the embedding's TrainedRows, whose rows these are then. PEFT's key says "delta" and means the values.
    """

    additive = False
    peft_base = "token_adapter.base_layer."
    ids: Tensor

    def __init__(
        self, layer: nn.Module, config: AdapterConfig, ids: list[int], tied_to: "TrainedRows | None" = None
    ) -> None:
        super().__init__(layer, config)
        self.rows: nn.Parameter
        self.is_tied = tied_to is not None
        stored = self.kind.stored(self.kind.weight(layer).detach())  # (all tokens, dim)
        self.rows = tied_to.rows if tied_to is not None else nn.Parameter(at_least_float32(stored[ids]))
        self.token_ids = ids
        self.register_buffer("ids", torch.tensor(ids), persistent=False)

    def transform(self, x: Tensor, below: Below, add: Tensor | None = None) -> Tensor:
        y = below(x)
        if isinstance(self.kind, EmbeddingKind):
            in_order, order = self.ids.sort()
            place = torch.searchsorted(in_order, x).clamp(max=len(in_order) - 1)
            padding = self.kind.padding_idx
            of_padding = self.token_ids.index(padding) if padding in self.token_ids else None
            trained = self.kind.look_up(order[place], self.rows.to(y.dtype), of_padding)
            y = torch.where((in_order[place] == x)[..., None], trained, y)
        else:
            bias = below.bias()
            trained = F.linear(x, self.rows.to(x.dtype), None if bias is None else bias[self.ids].to(x.dtype))
            y = y.index_copy(-1, self.ids, trained.to(y.dtype))
        return y if add is None else y + add

    def excludes(self, other: Adapter) -> bool:
        """All but other rows."""
        return not isinstance(other, TrainedRows) or not set(self.token_ids).isdisjoint(other.token_ids)

    def merged_weight(self, W: Tensor) -> Tensor:
        stored = at_least_float32(self.kind.stored(W))
        return self.kind.stored(stored.index_copy(0, self.ids, self.rows.to(stored.dtype)))

    def saved_tensors(self) -> dict[str, Tensor]:
        return {} if self.is_tied else {"token_adapter.trainable_tokens_delta": self.rows}


def _trained_rows(model: nn.Module, config: AdapterConfig) -> dict[str, "TrainedRows"]:
    """The rows that trainable_token_indices names, by the path of their layer; the tied head of an embedding follows.

    As in PEFT, a tied head for which other tokens are named has rows of its own.
    """
    named = getattr(config, "trainable_token_indices", None)
    if named is None:
        return {}
    modules = modules_before_adapters(model)
    if isinstance(named, list):
        embedding = input_embedding(model)
        if embedding is None:
            raise InputError("trainable_token_indices: name the embedding, {name: token ids}; this model does not tell")
        named = {embedding: named}
    found: dict[str, list[int]] = {}
    for name, ids in named.items():
        paths = [path for path in modules if path.endswith(name)]
        if not paths:
            raise InputError(
                f"trainable_token_indices: {name!r} matches no layer; {nearest_names([name], list(modules))}"
            )
        for path in paths:
            _check_token_ids(path, modules[path], ids)
            found[path] = ids
    rows = {path: TrainedRows(modules[path], config, ids) for path, ids in found.items()}
    embedding, head = tied_pair(model) or ("", "")
    if embedding in found:
        if found.get(head, found[embedding]) == found[embedding]:
            rows[head] = TrainedRows(modules[head], config, found[embedding], tied_to=rows[embedding])
        elif ensures_tying(config):
            raise InputError(f"ensure_weight_tying: trainable_token_indices differ between {embedding} and {head}")
    for path, ids in found.items():
        for user in embeddings_in_place_of(model, path):
            rows.setdefault(user, TrainedRows(modules[user], config, ids, tied_to=rows[path]))
    return rows


def _check_token_ids(path: str, layer: nn.Module, ids: list[int]) -> None:
    kind = kind_of(layer)
    if not isinstance(kind, EmbeddingKind) and not isinstance(layer, nn.Linear | NF4Linear):
        raise InputError(f"trainable_token_indices: {path}, a {type(layer).__name__}, has no row for each token")
    assert kind is not None
    tokens = kind.in_features if isinstance(kind, EmbeddingKind) else kind.out_features
    if wrong := [token for token in ids if not isinstance(token, int) or not 0 <= token < tokens]:
        raise InputError(
            f"trainable_token_indices: {wrong[0]!r} is no token id of {path}, which has 0 to {tokens - 1}; for new ones"
            " resize it first"
        )
    if not ids or len(set(ids)) < len(ids):
        raise InputError(f"trainable_token_indices of {path} are none, or some of them are there twice: {ids}")
