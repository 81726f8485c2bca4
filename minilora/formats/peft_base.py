"""What an adapter's folder holds of the base model: its embedding and head, in PEFT's keys by what is on the layer.

    .weight                             nothing
    .base_layer.weight                  an update
    .token_adapter.base_layer.weight    rows of its own
    .original_module.weight             a copy

A model whose embedding was resized for new tokens has rows that its checkpoint lacks. They are written, and read back.
"""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters import Adapter, input_embedding, modules_before_adapters, output_head, refuse_merged, tied_layers
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
    now, before = (getattr(getattr(each, "text_config", each), "vocab_size", None) for each in (config, original))
    return now != before


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


NewRows = dict[Tensor, Tensor]  # what the last rows of parameters of the model are to be


def without_the_base(
    model: nn.Module, tensors: Mapping[str, Tensor], expected: Collection[str], file: Any
) -> tuple[dict[str, Tensor], NewRows]:
    """The tensors without those of the base model, and the parameters of the model that have other last rows there.

    Those are the rows of new tokens, which start at random where an embedding is resized. Raises InputError naming one
    that has more than these to tell it from what the model has.
    """
    kept, new_rows, modules = dict(tensors), NewRows(), modules_before_adapters(model)
    trained_rows = [key for key in expected if key.endswith(ROWS)]
    of_tokens = {input_embedding(model), output_head(model), *tied_layers(model)}
    for key in sorted(tensors.keys() - set(expected)):
        if key.endswith(ROWS) and any(torch.equal(tensors[key], kept[same]) for same in trained_rows if same in kept):
            del kept[key]
            continue
        name = re.sub(r"\.(token_adapter\.base_layer|base_layer|original_module)\.", ".", key)
        layer, _, end = name.removeprefix("base_model.model.").rpartition(".")
        copied = tensors.get(key.replace(".modules_to_save.", "."))
        own = modules[layer]._parameters.get(end) if layer in modules else None
        original = own if copied is None or copied is tensors[key] else copied
        if original is None:
            continue
        if layer in of_tokens:
            _check_vocabulary(key, tensors[key], original, file)
        first = _first_other_row(original, tensors[key])
        if first is not None:
            rows = tensors[key][first:].to(original)
            # Of another base model no row would be the same.
            are_of_new_tokens = isinstance(original, nn.Parameter) and layer in of_tokens and first > len(original) // 2
            if not are_of_new_tokens or not torch.equal(new_rows.setdefault(original, rows), rows):
                raise InputError(
                    f"{file}: {key} is not the model's {layer}.{end}: the adapter belongs on another base model, or on"
                    " one whose embedding was resized and trained; load that one"
                )
        del kept[key]
    return kept, new_rows


def _check_vocabulary(key: str, tensor: Tensor, own: Tensor, file: Any) -> None:
    if tensor.shape[1:] == own.shape[1:] and len(tensor) != len(own):
        raise InputError(
            f"{file}: {key} has {len(tensor)} rows, the model's {len(own)}: the embedding was resized before the"
            f" training, so call model.resize_token_embeddings({len(tensor)}) before load_adapter"
        )


def _first_other_row(own: Tensor, theirs: Tensor) -> int | None:
    """The number of the first row of the file that is not the model's, rounded to either's dtype; None if all are."""
    if own.shape != theirs.shape:
        return 0
    theirs = theirs.to(own.device)
    same = (own == theirs.to(own.dtype)) | (own.to(theirs.dtype) == theirs)
    others = (~same.view(len(same), -1).all(1) if same.dim() else ~same[None]).nonzero()
    return int(others[0]) if len(others) else None


@contextmanager
def put_into_the_base(new_rows: NewRows) -> Iterator[None]:
    """Give these parameters of the base model their last rows; where what follows fails they are what they were."""
    before = {parameter: parameter.detach()[-len(rows) :].clone() for parameter, rows in new_rows.items()}
    try:
        for parameter, rows in new_rows.items():
            parameter.data[-len(rows) :] = rows
        yield
    except BaseException:
        for parameter, rows in before.items():
            parameter.data[-len(rows) :] = rows
        raise
