"""What an adapter's folder holds of the base model: its embedding and head, in PEFT's keys by what is on the layer.

    .weight                             nothing
    .base_layer.weight                  an update
    .token_adapter.base_layer.weight    rows of its own
    .original_module.weight             a copy

A model whose embedding was resized for new tokens has rows that its checkpoint lacks. They are written, and read back.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters import Adapter, input_embedding, modules_before_adapters, output_head, refuse_merged
from minilora.errors import InputError

ROWS = "token_adapter.trainable_tokens_delta"  # which PEFT writes a second time for a tied head


def was_resized(model: nn.Module, name_or_path: str | None) -> bool:
    """True if a transformers model's vocabulary is another than in the configuration that it was loaded from.

    Of a model on the hub that is the one in the cache: nothing is looked up. Warns where it is not there.
    """
    config: Any = getattr(model, "config", None)
    read = getattr(type(config), "from_pretrained", None)
    if read is None or not name_or_path:
        return False
    try:
        original = read(name_or_path, local_files_only=True)
    except (OSError, ValueError):  # not there, or no name of a repository
        warnings.warn(
            f"cannot read the config.json of {name_or_path}, to see whether the embedding was resized since: the"
            " adapter is saved without it; save_embedding_layers=True saves it too, False says that it is as it was",
            stacklevel=3,
        )
        return False
    vocabularies = [getattr(each.get_text_config(), "vocab_size", None) for each in (config, original)]
    return vocabularies[0] != vocabularies[1]


def embedding_tensors(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The base model's embedding and head by the ends of PEFT's keys; a head that is tied is the embedding."""
    refuse_merged(model)
    modules, found = modules_before_adapters(model), dict[str, Tensor]()
    for path in (input_embedding(model), output_head(model)):
        if path not in modules:
            continue
        if not isinstance(modules[path]._parameters.get("weight"), nn.Parameter):
            raise InputError(f"save_embedding_layers: {path}, a {type(modules[path]).__name__}, has no dense weight")
        of_base = adapters[path].peft_base if path in adapters else ""
        for name, parameter in modules[path].named_parameters(recurse=False):
            if not any(parameter is other for other in found.values()):
                found[f"{path}.{of_base}{name}"] = parameter
    if not found:
        raise InputError("save_embedding_layers: the model does not tell which of its layers is the embedding")
    return found


NewRows = dict[nn.Parameter, Tensor]


def without_the_base(
    model: nn.Module, tensors: Mapping[str, Tensor], expected: Iterable[str], file: Any
) -> tuple[dict[str, Tensor], NewRows]:
    """The tensors without those of the base model, and the parameters of the model that have other last rows there.

    Those are the rows of new tokens, which start at random where an embedding is resized. Raises InputError naming one
    that has more than these to tell it from what the model has.
    """
    kept, new_rows, modules = dict(tensors), NewRows(), modules_before_adapters(model)
    for key in sorted(tensors.keys() - set(expected)):
        if key.endswith(ROWS) and any(torch.equal(tensors[key], kept[same]) for same in expected if ROWS in same):
            del kept[key]
            continue
        name = re.sub(r"\.(token_adapter\.base_layer|base_layer|original_module)\.", ".", key)
        layer, _, end = name.removeprefix("base_model.model.").rpartition(".")
        own = modules[layer]._parameters.get(end) if layer in modules else None
        copied = tensors.get(key.replace(".modules_to_save.", "."))
        saved_twice = copied is not None and copied is not tensors[key]
        original = copied if saved_twice else own
        if original is None:
            continue
        _check_vocabulary(key, tensors[key], original, file)
        theirs = tensors[key].to(original.device, original.dtype)
        if not torch.equal(original, theirs):
            if saved_twice or own is None or not _differs_in_last_rows(own, new_rows.get(own, theirs), theirs):
                raise InputError(
                    f"{file}: {key} is not the model's {layer}.{end}: the adapter belongs on another base model, or on"
                    " one whose embedding was resized and trained; load that one"
                )
            new_rows[own] = theirs
        del kept[key]
    return kept, new_rows


def _check_vocabulary(key: str, tensor: Tensor, own: Tensor, file: Any) -> None:
    if tensor.shape[1:] == own.shape[1:] and len(tensor) != len(own):
        raise InputError(
            f"{file}: {key} has {len(tensor)} rows, the model's {len(own)}: the embedding was resized before the"
            f" training, so call model.resize_token_embeddings({len(tensor)}) before load_adapter"
        )


def _differs_in_last_rows(own: Tensor, before: Tensor, theirs: Tensor) -> bool:
    """True if more than half of the rows, from the first, are the model's, and the file says one thing of the others.

    Of another base model no row would be the same.
    """
    if own.shape != theirs.shape or not torch.equal(before, theirs):
        return False
    return torch.equal(own[: len(own) // 2 + 1], theirs[: len(own) // 2 + 1])


@contextmanager
def put_into_the_base(new_rows: NewRows) -> Iterator[None]:
    """Give these parameters of the base model these values; where what follows fails they are what they were."""
    before = {parameter: parameter.detach().clone() for parameter in new_rows}
    try:
        for parameter, values in new_rows.items():
            parameter.data.copy_(values)
        yield
    except BaseException:
        for parameter, values in before.items():
            parameter.data.copy_(values)
        raise
