"""EVA: start A along the directions in which a layer's inputs vary most, and give rank to the layers that need it.

    x = U S Vᵀ            the inputs x of a layer, over batches of the data to train on, about their mean
    A₀ = V_rᵀ, B₀ = 0     so that A x keeps as much of the inputs' variance as r numbers can
    explained_i = S_i² / Σ S²

The adapters have rank budget together as without EVA, r a layer. It goes to the components that explain most,
wherever they are: a layer gets as many as it has among them, none to r·rho. Layers with equal inputs (q, k and v) share
one decomposition, and batches are taken until all components in use have settled.

    add_adapter(model, LoRAConfig(init_lora_weights="eva", …))
    eva.initialize(model, batches, forward=minilora.language_model_loss)

Paischer et al. 2024, arXiv 2410.07170, section 3. Numbers as PEFT's.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapters import (
    LoRA,
    LoRAConfig,
    build_adapters,
    disable_adapters,
    evaluating,
    kaiming,
    register_initialization,
    replace_adapters,
    require_linear,
)
from minilora.errors import InputError
from minilora.progress import progress_bar
from minilora.variants.calibration import (
    Forward,
    IncrementalPCA,
    as_list,
    as_mapping,
    attended_tokens,
    looking_at_inputs,
    loras_to_start,
)

MOST_PASSES = 100  # over the batches, for components that do not settle


@dataclass(frozen=True)
class EVAOptions:
    """eva_config of LoRAConfig."""

    rho: float = 2.0
    """the highest rank of a layer, as a multiple of r; 1 keeps r everywhere"""
    tau: float = 0.99
    """a component has settled when its cosine with itself one batch before is at least this"""
    use_label_mask: bool = True
    """look only at tokens that have a label, where batches have labels; padding is never looked at"""
    label_mask_value: int = -100
    """the label that stands for none"""
    whiten: bool = False
    """divide each component by the root of its singular value"""
    adjust_scaling_factors: bool = True
    """change lora_alpha with the rank, so that lora_alpha / r stays"""

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise InputError(f"rho must be at least 1, not {self.rho!r}")
        if not 0 <= self.tau <= 1:
            raise InputError(f"tau must be from 0 to 1, not {self.tau!r}")


@register_initialization("eva", options=EVAOptions)
def eva(adapter: LoRA, layer: nn.Module) -> None:
    """A random, B = 0: what stands until `initialize`."""
    require_linear(adapter, layer)
    kaiming(adapter, layer)
    adapter.awaits_data = True


@torch.no_grad()
def initialize(model: nn.Module, batches: Iterable[Any], name: str = "default", *, forward: Forward) -> None:
    """Make the adapter anew by EVA: its ranks, lora_alpha and A, before the optimizer is made.

    A layer of rank 0 loses its adapter. What else the adapter trains starts anew too. Memory: one layer's inputs, and
    r·rho components for each different input.

    Args:
        model: any model with an adapter that has init_lora_weights="eva".
        batches: what the model is to be trained on, read once and kept; they are gone through, again if need be, until
            the components have settled. `minilora.variants.calibration.batches` says what a batch is.
        name: the adapter's.
        forward: calls the model on a batch, forward(model, batch); what it returns is not used.

    Raises:
        InputError: for another adapter's name or initialisation, for batches of fewer tokens than r·rho, and where the
            components do not settle. The model is then unchanged.

    Source: arXiv 2410.07170, section 3.
    """
    adapters = loras_to_start(model, name, "eva")
    config = next(iter(adapters.values())).config
    with disable_adapters(model), evaluating(model):
        components = find_components(model, adapters, as_list(batches), forward, config.init_options)

    ranks = {path: len(V) for path, V in components.items() if len(V)}
    new = redistributed(config, adapters, ranks)
    rebuilt = build_adapters(model, new, list(ranks))
    for path in ranks:
        rebuilt[path].get_parameter("lora_A").copy_(components[path])
        cast(LoRA, rebuilt[path]).awaits_data = False
    replace_adapters(model, rebuilt, name)


def redistributed(config: LoRAConfig, adapters: Mapping[str, LoRA], ranks: Mapping[str, int]) -> LoRAConfig:
    """The configuration with these ranks for the layers, and lora_alpha to go with them."""
    adjust = config.init_options.adjust_scaling_factors
    alphas = {
        path: adapters[path].lora_alpha * (rank / adapters[path].r if adjust else 1) for path, rank in ranks.items()
    }
    return replace(
        config,
        target_modules=config.target_modules if len(ranks) == len(adapters) else list(ranks),
        rank_pattern={path: rank for path, rank in ranks.items() if rank != config.r},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    )


# --- the components of the inputs ------------------------------------------------------------------------------------


class InputComponents:
    """Principal components of a layer's inputs, and which of them have settled."""

    def __init__(self, k: int, tau: float) -> None:
        self.pca, self.tau = IncrementalPCA(k), tau
        self.settled = torch.zeros(k, dtype=torch.bool)

    def take(self, x: Tensor) -> None:
        if len(x) < self.pca.k:
            return
        before, known = self.pca.components, self.pca.n > 0
        self.pca.update(x.float())
        if known:
            self.settled = F.cosine_similarity(self.pca.components, before) >= self.tau


def find_components(
    model: nn.Module, adapters: Mapping[str, LoRA], batches: list[Any], forward: Forward, options: EVAOptions
) -> dict[str, Tensor]:
    """The components (rank, in_features) that each layer's A starts from, by path; the ranks add up to the budget."""
    leader = first_with_same_input(model, list(adapters), batches[0], forward, options)
    most = {path: round(adapter.r * options.rho) for path, adapter in adapters.items()}
    groups = {first: max(most[path] for path in adapters if leader[path] == first) for first in leader.values()}
    for first, k in groups.items():
        if k > adapters[first].kind.in_features:
            raise InputError(
                f"{first} has {adapters[first].kind.in_features} inputs, too few for r·rho = {k} components:"
                " lower r, or rho in eva_config"
            )
    found = {first: InputComponents(k, options.tau) for first, k in groups.items()}
    budget = sum(adapter.r for adapter in adapters.values())
    ranks = {path: groups[leader[path]] for path in adapters}

    with progress_bar("EVA", len(found), "inputs") as advance:
        settled = 0
        for step in count():
            unsettled = [first for first, each in found.items() if not each.settled[: ranks[first]].all()]
            advance(len(found) - len(unsettled) - settled)
            settled = len(found) - len(unsettled)
            if not unsettled:
                break
            check_progress(found, step, len(batches))
            batch = batches[step % len(batches)]
            look = {first: found[first].take for first in unsettled}
            with looking_at_inputs(model, look, tokens_to_look_at(batch, options)):
                forward(model, batch)
            if all(each.pca.n for each in found.values()):
                ranks = distribute(found, leader, budget)

    result = {}
    for path, rank in ranks.items():
        pca = found[leader[path]].pca
        V = pca.components[:rank]
        result[path] = V / pca.singular_values[:rank, None].sqrt() if options.whiten else V
    return result


def check_progress(found: Mapping[str, InputComponents], step: int, n_batches: int) -> None:
    """Raises InputError where more of the same batches would not help."""
    lacking = [(first, each.pca.k) for first, each in found.items() if not each.pca.n]
    if lacking and step >= n_batches:
        first, k = lacking[0]
        raise InputError(f"{first}: no batch gives it r·rho = {k} tokens: give larger batches, or lower r or rho")
    if step >= MOST_PASSES * n_batches:
        raise InputError(
            f"the components have not settled in {MOST_PASSES} passes over {n_batches} batches: lower tau in eva_config"
        )


def distribute(found: Mapping[str, InputComponents], leader: Mapping[str, str], budget: int) -> dict[str, int]:
    """The rank of each layer: how many of its components are among the `budget` that explain most."""
    followers = [path for path in leader if leader[path] != path]
    shares = {path: found[leader[path]].pca.explained for path in [*found, *followers]}
    owners = [path for path, share in shares.items() for _ in share]
    best = torch.cat([*shares.values()]).argsort(descending=True)[:budget]
    counts = Counter(owners[i] for i in best.tolist())
    ranks = {path: counts[path] for path in leader}
    for path in followers:  # the budget may end among equals: the layer that is looked at takes the higher rank
        first = leader[path]
        ranks[first], ranks[path] = max(ranks[first], ranks[path]), min(ranks[first], ranks[path])
    return ranks


# --- the inputs of layers --------------------------------------------------------------------------------------------


def first_with_same_input(
    model: nn.Module, paths: list[str], batch: Any, forward: Forward, options: EVAOptions
) -> dict[str, str]:
    """For each layer the first one that gets the same input in this batch."""
    digests: dict[str, bytes] = {}

    def digest(path: str, x: Tensor) -> None:
        digests[path] = hashlib.sha256(x.contiguous().view(torch.uint8).cpu().numpy().tobytes()).digest()

    look = {path: partial(digest, path) for path in paths}
    with looking_at_inputs(model, look, tokens_to_look_at(batch, options)):
        forward(model, batch)
    first: dict[Any, str] = {}
    return {path: first.setdefault(digests.get(path, path), path) for path in paths}


def tokens_to_look_at(batch: Any, options: EVAOptions) -> Tensor | None:
    """True (B, T) there; None for all."""
    mask, labels = attended_tokens(batch), as_mapping(batch).get("labels")
    if not options.use_label_mask or labels is None:
        return mask
    labelled: Tensor = labels != options.label_mask_value
    return labelled if mask is None else mask & labelled
