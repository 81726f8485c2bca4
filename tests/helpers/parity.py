"""One cell of the parity matrix: a variant on a kind of layer in a dtype, in minilora, in PEFT and in float64.

The same base weights and the same adapter parameters on every side:

    minilora     what this repository computes
    PEFT         what the installed PEFT computes, with float32 adapters, its default
    PEFT, half   in bfloat16 and float16 also with adapters in the model's dtype (autocast_adapter_dtype=False)
    float64      the equation of the paper, from parity_variants.py, on dense float64 weights, with autograd

On each side: the output, the gradient of the input and of every adapter parameter, how far five steps of the optimizer
move each parameter, and the weights and the output after a merge.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from helpers.parity_layers import LAYERS, MODELS, bitsandbytes_linear, dequantized, in_4_bits
from helpers.parity_variants import EPS, LR, Parameters, Variant
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from minilora.adapters import merge
from minilora.adapters.attach import adapters_named
from minilora.adapters.targets import adapted_layers
from minilora.nf4.linear import NF4Linear

Tensors = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "NF4": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = ("bfloat16", "float16")
STEPS = 5

# --- what a side computes --------------------------------------------------------------------------------------------


@dataclass
class Side:
    """A model with an adapter on one of the sides. Keys are "<path of the layer>.lora_A", the same on every side."""

    model: Callable[[Tensor], Any]
    parameters: dict[str, nn.Parameter]
    constants: Tensors  # what the adapter's equation has beside its parameters
    optimizer: Callable[[], torch.optim.Optimizer]
    merge: Callable[[], Tensors]  # gives the weights and biases of the adapted layers

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return y if isinstance(y, Tensor) else y.logits

    def observe(self, x: Tensor, target: Tensor) -> dict[str, Tensors | str]:
        """Every quantity but the start; for the merge, perhaps why it is refused. The adapter is merged at the end."""
        leaf = x.clone().requires_grad_() if x.is_floating_point() else x
        wanted = {"x": leaf, **self.parameters} if leaf.requires_grad else self.parameters
        y, loss = self._loss(leaf, target)
        gradients = torch.autograd.grad(loss, list(wanted.values()))
        return {
            "forward": {"y": y.detach()},
            "gradients": dict(zip(wanted, gradients, strict=True)),
            "5 steps": self._steps(x, target),
            "merge": self._merge(x),
        }

    def _loss(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        y = self.forward(x)
        difference = y.to(torch.promote_types(y.dtype, torch.float32)) - target
        return y, difference.pow(2).sum() / (2 * y.shape[0] * y.shape[1])

    def _steps(self, x: Tensor, target: Tensor) -> Tensors:
        """How far the steps move each parameter; then it is put back."""
        before = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        optimizer = self.optimizer()
        for _ in range(STEPS):
            optimizer.zero_grad()
            self._loss(x, target)[1].backward()
            optimizer.step()
        moved = {key: self.parameters[key].detach().double() - start.double() for key, start in before.items()}
        for key, start in before.items():
            self.parameters[key].data.copy_(start)
        return moved

    @torch.no_grad()
    def _merge(self, x: Tensor) -> Tensors | str:
        try:
            return {**self.merge(), "y": self.forward(x)}
        except Exception as error:  # PEFT raises errors of every kind, and minilora's say why
            return reason(error)


def reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def canonical(key: str) -> str:
    """PEFT's name of a parameter without what depends on the layer's kind: lora_embedding_A and lora_A.weight."""
    return key.removesuffix(".weight").replace("lora_embedding_", "lora_")


def stored_weights(layers: dict[str, nn.Module]) -> Tensors:
    """The floating-point weights and biases of the layers, as they are stored."""
    names = [(path, name) for path in layers for name in ("weight", "bias")]
    found = {f"{path}.{name}": getattr(layers[path], name, None) for path, name in names}
    return {key: p.detach().clone() for key, p in found.items() if p is not None and p.is_floating_point()}


def optimizer_maker(dtype: str) -> Callable[[Any], torch.optim.Optimizer]:
    """AdamW; in half precision SGD.

    Adam divides by |g|: where g is smaller than its rounding error, a whole step goes the one way or the other, which
    in 8 bits says more about luck than about the library. SGD's way is as exact as the gradients are.
    """
    if dtype in HALF:
        return partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    return partial(torch.optim.AdamW, lr=LR, eps=EPS, weight_decay=0.0)


def our_side(base: nn.Module, variant: Variant, targets: tuple[str, ...], x: Tensor, dtype: str) -> Side:
    model = copy.deepcopy(base)
    variant.add_ours(model, list(targets), x)
    adapters = adapters_named(model, "default")
    parameters = {
        canonical(f"{path}.{adapter.peft_name(name)}"): parameter
        for path, adapter in adapters.items()
        for name, parameter in adapter.named_parameters()
    }
    constants = {
        f"{path}.{name}": constant
        for path, adapter in adapters.items()
        for name, constant in [*adapter.named_buffers(recurse=False), *adapter.shared_tensors().items()]
    }

    def merged() -> Tensors:
        merge(model)
        return stored_weights({path: layer.base_layer for path, layer in adapted_layers(model).items()})

    return Side(model, parameters, constants, lambda: variant.our_optimizer(model, optimizer_maker(dtype)), merged)


def peft_side(
    base: nn.Module, variant: Variant, targets: tuple[str, ...], x: Tensor, dtype: str, autocast: bool = True
) -> Side:
    model = variant.add_theirs(copy.deepcopy(base), list(targets), x, autocast)
    parameters = {
        canonical(key.removeprefix("base_model.model.").replace(".default", "")): parameter
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and "ranknum" not in key  # AdaLoRA's number of ranks, as if it were to be learnt
    }
    if variant.tied_as_one:  # the head's are other names for the memory of the embedding's
        parameters = {key: p for key, p in parameters.items() if not key.startswith("lm_head")}
    shared = {name: getattr(model.base_model, name)["default"] for name in variant.shared}
    constants = {f"{path}.{name}": value for path in targets for name, value in shared.items()}

    def merged() -> Tensors:
        model.base_model.merge_adapter()
        return stored_weights({path: model.base_model.model.get_submodule(path).base_layer for path in targets})

    return Side(model, parameters, constants, lambda: variant.their_optimizer(model, optimizer_maker(dtype)), merged)


def float64_side(base: nn.Module, variant: Variant, targets: tuple[str, ...], values: Tensors, dtype: str) -> Side:
    """The equation on dense float64 weights, with these values of the parameters and constants."""
    model = copy.deepcopy(base).double()
    groups = {path: getattr(model.get_submodule(path), "groups", 1) for path in targets}
    for path, n in groups.items():
        if n > 1 and variant.dense_groups:  # the same convolution as one group
            layer = model.get_submodule(path)
            layer.weight.data, layer.groups = block_diagonal(layer.weight.data, n), 1
    constant = (*variant.shared, "start_A", "start_B")
    constants = {key: value.double() for key, value in values.items() if key.endswith(constant)}
    parameters = {key: nn.Parameter(value.double()) for key, value in values.items() if key not in constants}

    def merged() -> Tensors:
        result = {}
        for path in targets:
            owner = targets[-1] if variant.tied_as_one else path  # the embedding
            everything = {**constants, **parameters}.items()
            p: Parameters = {key.removeprefix(f"{owner}."): q for key, q in everything if key.startswith(f"{owner}.")}
            if owner != path:
                p = {"lora_A": p["lora_B"].T, "lora_B": p["lora_A"].T}
            if "lora_B" in p and p["lora_B"].shape[1] * groups[path] == p["lora_A"].shape[0]:
                p["lora_B"] = block_diagonal(p["lora_B"], groups[path])
            layer = model.get_submodule(path)
            turned = isinstance(layer, Conv1D | nn.Embedding)  # they store W as (in, out)
            W = variant.weight(layer.weight.T if turned else layer.weight, p)
            result[f"{path}.weight"] = W.T if turned else W
            bias = getattr(layer, "bias", None)
            if bias is not None:
                result[f"{path}.bias"] = variant.bias(bias, p)
        return result

    def forward(x: Tensor) -> Any:
        return functional_call(model, merged(), (x,), tie_weights=False)

    return Side(forward, parameters, {}, lambda: variant.exact_optimizer(parameters, optimizer_maker(dtype)), merged)


def block_diagonal(weight: Tensor, groups: int) -> Tensor:
    """The dense weight (out, in, *kernel) of a convolution whose stored one is (out, in / groups, *kernel)."""
    blocks = weight.chunk(groups)
    rows = [[block if i == j else torch.zeros_like(block) for j in range(groups)] for i, block in enumerate(blocks)]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


# --- one cell --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    variant: Variant
    layers: str  # of LAYERS or MODELS
    dtype: str

    def __str__(self) -> str:
        return f"{self.variant.name} | {self.layers} | {self.dtype}"


@dataclass
class Result:
    """What was measured in one cell: relative errors by side and quantity, and refusals."""

    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # of each side, against float64
    difference: dict[str, float] = field(default_factory=dict)  # of minilora from PEFT
    refusals: dict[str, dict[str, str]] = field(default_factory=dict)  # side -> "all" or a quantity -> why


def measure(cell: Cell) -> Result:
    torch.manual_seed(0)
    layers = {**LAYERS, **MODELS}[cell.layers]
    base = layers.make().to(DTYPES[cell.dtype]).requires_grad_(False)
    x = layers.x()
    x = x.to(DTYPES[cell.dtype]) if x.is_floating_point() else x
    result = Result()
    sides = build_sides(cell, base, x, result)
    if not sides:
        return result
    if "minilora" in sides and "PEFT" in sides:
        result.difference["start"] = difference_at_start(sides["minilora"], sides["PEFT"], cell.variant.up_to_sign)
    dense = in_4_bits(base, dequantized) if cell.dtype == "NF4" else base
    if cell.variant.replaces_base:
        dense = with_our_weights(dense, sides["minilora"], layers.targets)
    values = same_values(sides, cell.variant)

    exact_side = float64_side(dense, cell.variant, layers.targets, values, cell.dtype)
    exact_x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        target = exact_side.forward(exact_x)
        target = target + target.std() * torch.randn(target.shape)
    exact = exact_side.observe(exact_x, target)
    seen = {}
    for name, side in sides.items():
        try:
            seen[name] = side.observe(x, target.float())
        except Exception as error:  # PEFT raises errors of every kind
            result.refusals[name] = {"all": reason(error)}
            continue
        result.errors[name] = compare(seen[name], exact, cell.dtype in HALF)
        if isinstance(seen[name]["merge"], str):
            result.refusals[name] = {"merge": seen[name]["merge"]}
    if "minilora" in seen and "PEFT" in seen:
        result.difference |= compare(seen["minilora"], seen["PEFT"], cell.dtype in HALF)
    return result


def build_sides(cell: Cell, base: nn.Module, x: Tensor, result: Result) -> dict[str, Side]:
    """minilora's and PEFT's side on copies of the base; a side that cannot be built is among the result's refusals."""
    our_base = in_4_bits(base, NF4Linear.from_linear) if cell.dtype == "NF4" else base
    their_base = in_4_bits(base, bitsandbytes_linear) if cell.dtype == "NF4" else base
    rest = (cell.variant, {**LAYERS, **MODELS}[cell.layers].targets, x, cell.dtype)
    makers = {"minilora": partial(our_side, our_base, *rest), "PEFT": partial(peft_side, their_base, *rest)}
    if cell.dtype in HALF:
        makers["PEFT, half"] = partial(peft_side, their_base, *rest, autocast=False)
    sides: dict[str, Side] = {}
    for name, make in makers.items():
        torch.manual_seed(1)  # the same draws
        try:
            side = make()
            if "minilora" in sides:
                check_shapes(side, sides["minilora"])
            sides[name] = side
        except Exception as error:  # PEFT raises errors of every kind
            result.refusals[name] = {"all": reason(error)}
    return sides


def difference_at_start(mine: Side, theirs: Side, up_to_sign: bool) -> float:
    def start(side: Side) -> Tensors:
        return {key: p.detach().abs() if up_to_sign else p for key, p in side.parameters.items()}

    return largest_error(start(mine), start(theirs))


def check_shapes(theirs: Side, mine: Side) -> None:
    """Raises ValueError where PEFT gives a parameter another shape, as for a layer whose storage it misreads."""
    assert theirs.parameters.keys() == mine.parameters.keys(), (theirs.parameters.keys(), mine.parameters.keys())
    for key, parameter in theirs.parameters.items():
        if parameter.shape != mine.parameters[key].shape:
            wanted = tuple(mine.parameters[key].shape)
            raise ValueError(f"{key.rpartition('.')[2]} has the shape {tuple(parameter.shape)}, not {wanted}")


def with_our_weights(dense: nn.Module, side: Side, targets: tuple[str, ...]) -> nn.Module:
    """The model with the base weights that minilora's adapter has put under itself: LoftQ's Q."""
    dense = copy.deepcopy(dense)
    for path in targets:
        layer = dense.get_submodule(path)
        W = side.model.get_submodule(path).base_layer.dequantize(torch.float32)  # type: ignore[attr-defined]
        layer.weight.data = (W.T if isinstance(layer, Conv1D) else W).clone()
    return dense


@torch.no_grad()
def same_values(sides: dict[str, Side], variant: Variant) -> Tensors:
    """Give every side the same parameters and constants: PEFT's start, where it has one, moved at random."""
    source = sides.get("PEFT") or next(iter(sides.values()))
    start = {key: p.detach().clone().float() for key, p in source.parameters.items()}
    constants = {key: c.clone().float() for key, c in source.constants.items()}
    if variant.starts_elsewhere:
        constants = {key.replace("lora_", "start_"): p for key, p in start.items()}
    generator = torch.Generator().manual_seed(2)
    moved = {
        key: p + 0.1 * torch.randn(p.shape, generator=generator) / max(p.shape[-1], 8) ** 0.5
        for key, p in start.items()
    }
    for side in sides.values():
        for key, parameter in side.parameters.items():
            parameter.data.copy_(moved[key])
        for key, constant in side.constants.items():
            constant.copy_(constants[key])
    return moved | constants


def compare(a: dict[str, Tensors | str], b: dict[str, Tensors | str], half: bool) -> dict[str, float]:
    """The error of each quantity that both have: the largest of its tensors, or in half precision of all together."""
    error = error_together if half else largest_error
    pairs = {quantity: (mine, b[quantity]) for quantity, mine in a.items()}
    return {quantity: error(*pair) for quantity, pair in pairs.items() if not any(isinstance(x, str) for x in pair)}


def relative_errors(a: Any, b: Any) -> list[tuple[int, float]]:
    """Of each tensor that both have, how many numbers it holds and |a − b| / |b|, Frobenius norms."""
    pairs = [(a[key].detach().double(), b[key].detach().double()) for key in a.keys() & b.keys()]
    return [
        (p.numel(), 0.0 if torch.equal(p, q) else float((p - q).norm() / q.norm()))
        for p, q in pairs
        if p.shape == q.shape  # a grouped weight is smaller than the dense one of the float64 side
    ]


def largest_error(a: Any, b: Any) -> float:
    """Of the tensors; infinite for NaN."""
    return max(error if math.isfinite(error) else math.inf for _, error in relative_errors(a, b))


def error_together(a: Any, b: Any) -> float:
    """The root mean square over the numbers of all tensors, so that one of four numbers does not decide by its luck."""
    errors = relative_errors(a, b)
    mean_square = sum(n * error**2 for n, error in errors) / sum(n for n, _ in errors)
    return math.sqrt(mean_square) if math.isfinite(mean_square) else math.inf
