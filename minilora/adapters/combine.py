"""Several adapters combined into a new one: PEFT's `add_weighted_adapter`.

With the updates ΔWᵢ = sᵢBᵢAᵢ and a weight wᵢ for each, the new adapter B A (its scaling is 1) is

    cat        A = [w₁s₁A₁; w₂s₂A₂; …], B = [B₁, B₂, …]        Σ wᵢΔWᵢ exactly, of rank Σ rᵢ
    svd        BA ≈ Σ wᵢΔWᵢ                                    the nearest of rank svd_rank
    linear     A = Σ ±√|wᵢsᵢ| Aᵢ, B = Σ √|wᵢsᵢ| Bᵢ             of rank r, cheap: with cross terms BᵢAⱼ

The others thin out what they add up, or add up only what points the same way; each does this to the factors Aᵢ and
Bᵢ as linear does, or by its _svd form to the updates ΔWᵢ, as its paper does:

    magnitude_prune, dare_linear, ties, dare_ties, and …_svd
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minilora.adapters.adapter import Adapter, AdapterConfig, at_least_float32
from minilora.adapters.attach import adapters_named, attach, build_adapters, check_new_name, refuse_merged
from minilora.adapters.combine_parts import combine_part, parts_config
from minilora.adapters.layer import AdaptedLayer
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.mixtures import MIXTURES, Add, Thin, keep_all
from minilora.adapters.targets import adapted_layers
from minilora.adapters.trained_parts import TrainedCopy, TrainedRows
from minilora.errors import InputError
from minilora.progress import with_progress

METHODS = ["cat", "svd", *MIXTURES, *(f"{name}_svd" for name in MIXTURES if name != "linear")]


# --- adapters --------------------------------------------------------------------------------------------------------


class Weighted(NamedTuple):
    """One of the adapters that are combined on a layer."""

    name: str
    weight: float
    adapter: Adapter

    def is_part(self) -> bool:
        """True if it is no update: a copy of a module, or rows of an embedding."""
        return isinstance(self.adapter, TrainedCopy | TrainedRows)

    def is_product(self) -> bool:
        """True if ΔW is s·BA with the factors that `LoRA.factors` gives, and nothing else."""
        adapter = self.adapter
        return isinstance(adapter, LoRA) and adapter.additive and type(adapter).delta is LoRA.delta

    def product(self) -> tuple[float, Tensor, Tensor]:
        """w·s, A and B with w·ΔW = (w·s)·BA; A and B in float32 or better."""
        assert isinstance(self.adapter, LoRA)
        A, B = self.adapter.factors()
        return self.weight * self.adapter.scaling, at_least_float32(A), at_least_float32(B)

    def rank(self) -> int:
        return len(self.product()[1])

    def update(self, layer: AdaptedLayer) -> Tensor:
        """ΔW (out, in, *kernel) = W' − W, in float32 or better."""
        if self.adapter.additive:
            return self.adapter.delta()
        W = at_least_float32(layer.kind.weight(layer.base_layer))
        return self.adapter.merged_weight(W) - W


def combine_adapters(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    method: str = "svd",
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
) -> None:
    """Combine these adapters, weighted, into a new LoRA of the model and make it the active one.

    A single adapter is thinned out or truncated too, where PEFT always takes "linear". The copies (modules_to_save) and
    rows (trainable_token_indices) that adapters have beside their updates are combined too, which PEFT refuses or
    forgets: what each differs by from the base model's is thinned out, weighted and added up as the method says; with
    "cat", "svd" and "linear" that is the weighted sum of the differences. No SVD is made of it. What
    ensure_weight_tying trained as one is the same twice, and trains apart from then on.

    Args:
        model: a model with these adapters, not merged.
        names: which adapters.
        weights: a number for each, also negative: −1 takes back what an adapter has learnt.
        new_name: what to call the new one.
        method: "cat", for LoRAs of any ranks and scalings; "svd" and the methods that end in "_svd", for every variant
            that changes W and nothing else; "linear", "magnitude_prune", "dare_linear", "ties", "dare_ties", for plain
            LoRAs of one rank.
        density: the share of the numbers, above 0 and at most 1, that the methods keep which thin out. The dare methods
            draw from torch's random numbers.
        majority_sign_method: "total" or "frequency", for the ties methods.
        svd_rank: the new rank of the svd methods; by default the largest rank among the adapters.
        svd_clamp: clamp both factors of an SVD to plus or minus this quantile of their numbers.

    Raises:
        InputError: for what cannot be combined so, naming the layer and the adapter: biases, target_parameters, a copy
            with an update of the same layer. The model is then unchanged.

    Source: PEFT's `LoraModel.add_weighted_adapter`, with which the results agree, except with use_rslora: there PEFT's
        sum is √r times too large.
    """
    combination = Combination(method, density, majority_sign_method, svd_rank, svd_clamp)
    if not names or len(names) != len(weights):
        raise InputError(f"combine_adapters needs a weight for each adapter, not {len(weights)} for {len(names)}")
    adapters = [adapters_named(model, name) for name in names]
    check_new_name(model, new_name)
    refuse_merged(model)
    for name, of in zip(names, adapters, strict=True):
        if beside := not_combined(next(iter(of.values())).config):
            raise InputError(f"{name!r} trains more than updates of weights, which cannot be combined: {beside}")
    layers = {path: layer for path, layer in adapted_layers(model).items() if any(path in of for of in adapters)}
    parts = {
        path: [Weighted(n, w, of[path]) for n, w, of in zip(names, weights, adapters, strict=True) if path in of]
        for path in layers
    }
    with torch.no_grad():
        config = next(iter(adapters[0].values())).config
        attach(model, combination.combined(model, layers, parts, like=config), new_name)


def not_combined(config: AdapterConfig) -> list[str]:
    """The keys of what the configuration trains and nothing can be combined with."""
    values = {key: getattr(config, key, None) for key in ("bias", "target_parameters")}
    return [key for key, value in values.items() if value and value != "none"]


def lora_config(ranks: dict[str, int], like: AdapterConfig) -> LoRAConfig:
    """A configuration for LoRAs of these ranks on the layers at these paths, with scaling 1."""
    r = max(ranks.values())
    # ^ keeps a path from matching as the end of another one
    others = {"^" + path.replace(".", r"\."): rank for path, rank in ranks.items() if rank != r}
    return LoRAConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=list(ranks),
        fan_in_fan_out=getattr(like, "fan_in_fan_out", False),
        task_type=like.task_type,
        base_model_name_or_path=like.base_model_name_or_path,
    )


@dataclass(frozen=True)
class Combination:
    """How to combine: the arguments of `combine_adapters`, checked, and what they do on one layer."""

    method: str
    density: float | None
    majority_sign_method: str
    svd_rank: int | None
    svd_clamp: float | None

    def __post_init__(self) -> None:
        method, density = self.method, self.density
        if method not in METHODS:
            raise InputError(f"combine_adapters: method={method!r} is not one of {', '.join(METHODS)}")
        thins = self.mixture[0] is not keep_all
        if thins and (density is None or not 0 < density <= 1):
            raise InputError(
                f"method={method!r} needs density, the share of numbers to keep, in (0, 1], not {density!r}"
            )
        if not thins and density is not None:
            raise InputError(f"method={method!r} keeps all numbers: leave density={density!r} out")
        if self.majority_sign_method not in ("total", "frequency"):
            raise InputError(f"majority_sign_method={self.majority_sign_method!r} is not 'total' or 'frequency'")
        for name, value in (("svd_rank", self.svd_rank), ("svd_clamp", self.svd_clamp)):
            if value is not None and not self.decomposes:
                raise InputError(f"method={method!r} makes no SVD: leave {name}={value!r} out")
        if self.svd_rank is not None and (not isinstance(self.svd_rank, int) or self.svd_rank < 1):
            raise InputError(f"svd_rank must be a whole number of at least 1, not {self.svd_rank!r}")
        if self.svd_clamp is not None and not 0 < self.svd_clamp <= 1:
            raise InputError(f"svd_clamp is a quantile, above 0 and at most 1, not {self.svd_clamp!r}")

    @property
    def decomposes(self) -> bool:
        return self.method.endswith("svd")

    @property
    def mixture(self) -> tuple[Thin, Add]:
        return MIXTURES["linear" if self.method in ("cat", "svd") else self.method.removesuffix("_svd")]

    def thin(self, x: Tensor) -> Tensor:
        return self.mixture[0](x, self.density or 1.0)

    def add(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return self.mixture[1](tensors, weights, self.majority_sign_method)

    def mix(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The tensors thinned out, weighted and added up."""
        return self.add([self.thin(x) for x in tensors], weights)

    def combined(
        self, model: nn.Module, layers: dict[str, AdaptedLayer], parts: dict[str, list[Weighted]], like: AdapterConfig
    ) -> dict[str, Adapter]:
        """The new adapters by path, made of those on each layer."""
        updates = {path: on for path, on in parts.items() if not any(part.is_part() for part in on)}
        beside = parts_config(
            {path: [(part.name, part.adapter) for part in on] for path, on in parts.items() if path not in updates}
        )
        for path, on in updates.items():
            self.check(path, layers[path], on)
        ranks = self.ranks(updates)
        new = build_adapters(model, replace(lora_config(ranks, like), **beside), list(updates))
        if other := sorted(new.keys() ^ parts.keys()):
            raise InputError(
                f"{other[0]} has no name of its own that modules_to_save or trainable_token_indices can say"
            )
        for path, adapter in with_progress(new.items(), len(new), "Combining adapters", "layers"):
            on = parts[path]
            if path not in updates:
                add = partial(self.add, weights=[part.weight for part in on])
                combine_part(path, adapter, [part.adapter for part in on], self.thin, add)
            else:
                assert isinstance(adapter, LoRA)
                A, B = self.factors(layers[path], on, ranks[path])
                # Factors of less than the rank are filled up with zeros.
                adapter.lora_A.zero_()[: len(A)] = A.reshape(len(A), *adapter.lora_A.shape[1:])
                adapter.lora_B.zero_()[:, : B.shape[1]] = B.reshape(*B.shape[:2], *adapter.lora_B.shape[2:])
        return new

    def check(self, path: str, layer: AdaptedLayer, parts: list[Weighted]) -> None:
        """Raise InputError where the parts on this layer cannot be combined."""
        bias = getattr(layer.base_layer, "bias", None)
        elementwise = self.method in MIXTURES
        for part in parts:
            adapter = part.adapter
            what = f"{path}: {part.name!r} ({type(adapter).__name__})"
            if adapter.merged_bias(bias) is not bias:
                raise InputError(f"{what} changes the bias too, which a LoRA cannot hold")
            if getattr(layer.kind, "groups", 1) > 1 and not elementwise:
                raise InputError(f"{what} is on a convolution with groups: combine it by {', '.join(MIXTURES)}")
            if not self.decomposes and not part.is_product():
                raise InputError(f"{what} has no factors B and A for method={self.method!r}: combine it by 'svd'")
            if self.decomposes and self.svd_rank is None and not part.is_product():
                raise InputError(f"{what} has no rank of its own: give svd_rank")
            if elementwise and part.rank() != parts[0].rank():
                raise InputError(f"{what} has another rank than {parts[0].name!r}: combine them by 'cat' or 'svd'")
            if elementwise and part.rank() != getattr(adapter, "r", None):
                raise InputError(f"{what} is a difference of two products, BA − B₀A₀: combine it by 'cat' or 'svd'")

    def ranks(self, parts: dict[str, list[Weighted]]) -> dict[str, int]:
        """The new adapter's rank on every layer."""
        if self.method == "cat":
            return {path: sum(part.rank() for part in on) for path, on in parts.items()}
        if not self.decomposes:
            return {path: on[0].rank() for path, on in parts.items()}
        rank = self.svd_rank or max(part.rank() for on in parts.values() for part in on)
        sizes = {path: on[0].adapter.kind.shape for path, on in parts.items()}
        return {path: min(rank, shape[0], math.prod(shape[1:])) for path, shape in sizes.items()}

    def factors(self, layer: AdaptedLayer, parts: list[Weighted], rank: int) -> tuple[Tensor, Tensor]:
        """A (rank, …) and B (out, rank, …), in the shape of LoRA's or flattened to matrices; or of less than rank."""
        if self.method == "cat":
            return concatenated(parts)
        if self.method == "svd" and self.svd_clamp is None and all(part.is_product() for part in parts):
            return decomposed_product(*concatenated(parts), rank)
        if self.decomposes:
            mixed = self.mix([part.update(layer) for part in parts], [part.weight for part in parts])
            return decomposed(mixed.flatten(1), rank, self.svd_clamp)
        ws, A, B = zip(*[part.product() for part in parts], strict=True)
        # √|ws| on either side, and the sign on one, or two negative ones would make a positive product
        return self.mix(A, [math.copysign(abs(w) ** 0.5, w) for w in ws]), self.mix(B, [abs(w) ** 0.5 for w in ws])


# --- factors ---------------------------------------------------------------------------------------------------------


def concatenated(parts: list[Weighted]) -> tuple[Tensor, Tensor]:
    """[w₁s₁A₁; w₂s₂A₂; …] and [B₁, B₂, …]."""
    ws, A, B = zip(*[part.product() for part in parts], strict=True)
    return torch.cat([w * a for w, a in zip(ws, A, strict=True)]), torch.cat(B, dim=1)


def decomposed(M: Tensor, rank: int, clamp: float | None) -> tuple[Tensor, Tensor]:
    """A = Vᵀ (rank, in) and B = U S (out, rank) of the largest singular values: the nearest BA to M of this rank."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    A, B = Vh[:rank], U[:, :rank] * S[:rank]
    if clamp is not None:
        limit = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A, B = A.clamp(-limit, limit), B.clamp(-limit, limit)
    return A, B


def decomposed_product(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same of M = BA without making M: B = Q_b R_b and Aᵀ = Q_a R_a, so M = Q_b (R_b R_aᵀ) Q_aᵀ, a small SVD."""
    Qb, Rb = torch.linalg.qr(B.flatten(1))
    Qa, Ra = torch.linalg.qr(A.flatten(1).T)
    small_A, small_B = decomposed(Rb @ Ra.T, rank, None)
    return small_A @ Qa.T, Qb @ small_B
