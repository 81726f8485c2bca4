"""What a run was started with, and what of it differs when it is to be resumed: a run must be continued as itself."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from minilora.adapters import adapters_named
from minilora.data import Example


def fingerprint(
    model: nn.Module,
    adapter: str,
    parameters: Mapping[str, nn.Parameter],
    settings: Mapping[str, Any],
    examples: Sequence[Example],
    eval_examples: Sequence[Example],
) -> dict[str, Any]:
    """What must be the same for a resumed run to continue the first one, as JSON."""
    adapters = adapters_named(model, adapter).values()
    own = {id(tensor) for each in adapters for tensor in (*each.parameters(), *each.buffers())}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "adapter": dataclasses.asdict(next(iter(adapters)).config),
        "settings": dict(settings),
        "training rows": _hash_examples(examples),
        "held-out rows": _hash_examples(eval_examples),
        "trained parameters": {name: list(parameter.shape) for name, parameter in parameters.items()},
        "base model": _hash_tensors((name, tensor) for name, tensor in tensors if id(tensor) not in own),
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the fingerprints of two runs, in words."""
    found = [
        f"{name} was {saved[group].get(name)!r} and is {now[group].get(name)!r}"
        for group in ("settings", "adapter")
        for name in sorted(saved[group].keys() | now[group].keys())
        if saved[group].get(name) != now[group].get(name)
    ]
    found += [f"the {rows} are not the same" for rows in ("training rows", "held-out rows") if saved[rows] != now[rows]]
    if saved["base model"] != now["base model"]:
        found.append("the base model is another")
    was, shapes = saved["trained parameters"], now["trained parameters"]
    if changed := [name for name in sorted(was.keys() | shapes.keys()) if was.get(name) != shapes.get(name)]:
        before, after = (each.get(changed[0], "not trained") for each in (was, shapes))
        found.append(f"{len(changed)} trained parameters differ, such as {changed[0]}: {before} before, {after} now")
    return found


def _hash_examples(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.input_ids}{example.labels}".encode())
    return digest.hexdigest()


def _hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Names, shapes, dtypes and a sample of every tensor: enough to tell two models apart without reading gigabytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)].cpu().double()
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}{sample.tolist()}".encode())
    return digest.hexdigest()
