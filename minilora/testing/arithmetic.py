"""Checks of what a variant computes: where it starts, its gradients, merging, dropout, shapes and half precision."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck

from minilora.adapters import (
    AdaptedLayer,
    Adapter,
    LoRAConfig,
    adapter_parameters,
    add_adapter,
    disable_adapters,
    merge,
    set_adapter,
    unload,
    unmerge,
)
from minilora.testing.trial import (
    LAYERS,
    NAMES,
    Trial,
    adapters_of,
    bits,
    changed_bits,
    check,
    distance,
    example_input,
    in_float64,
    shake,
    tokens,
    trained,
)


@check(*LAYERS)
def starts_as_the_base_model(trial: Trial, layer: str) -> None:
    """A new adapter changes nothing."""
    model = trial.base(layer)
    x = example_input(model)
    before = model(x)
    trial.put_on(model, "default")
    look_at = f"__init__ (where it starts) and {trial.computes} (does it add `add`?)"
    trial.expect_equal(model(x), before, "the base model's output after add_adapter", look_at)


@check(*LAYERS)
def gradients_equal_finite_differences(trial: Trial, layer: str) -> None:
    """In float64, of every parameter and of the input. What `held_constant` names is held constant in both.

    A declaration of what takes no gradient must be true: without holding anything, some gradient has to differ.
    """
    model = in_float64(trial.model(layer))
    x = example_input(model)
    leaves = trained(model)
    if x.is_floating_point():
        x = x.double().requires_grad_()
        leaves["the input"] = x
    with _held_constant(model, x):
        if _wrong_gradient(model, x, *leaves.values()):
            for name, leaf in leaves.items():  # one by one, to name it
                problem = _wrong_gradient(model, x, leaf)
                expected = f"the gradient of {name} that finite differences give"
                trial.expect(problem is None, expected, f"{problem}", trial.computes)
    if trial.variant.held_constant:
        names, honest = ", ".join(trial.variant.held_constant), _wrong_gradient(model, x, *leaves.values()) is not None
        trial.expect(honest, f"no gradient through {names}", "the whole gradient", "held_constant")


def _wrong_gradient(model: nn.Module, x: Tensor, *leaves: Tensor) -> str | None:
    """What is wrong where the gradients of the leaves are not the finite differences.

    Compared along random directions (fast_mode): a wrong number anywhere changes what is found there.
    """
    try:  # float64 with steps of 1e-6: the differences are right to about 1e-9
        gradcheck(lambda *_: model(x), leaves, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)
    except GradcheckError as error:
        return str(error).splitlines()[0].rstrip(",")
    return None


@contextmanager
def _held_constant(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Inside the `with`, the methods that `held_constant` names return what they return now for x."""
    held = [(adapter, name) for adapter in adapters_of(model) for name in adapter.held_constant]
    recorded: dict[tuple[Adapter, str], list[Tensor]] = {key: [] for key in held}
    for adapter, name in held:
        _record(adapter, name, recorded[adapter, name])
    model(x)
    for (adapter, name), values in recorded.items():
        _replay(adapter, name, values)
    yield
    for adapter, name in held:
        delattr(adapter, name)  # the class's own method again


def _record(adapter: Adapter, name: str, values: list[Tensor]) -> None:
    method = getattr(adapter, name)

    def recording(*args: object, **keywords: object) -> Tensor:
        values.append(method(*args, **keywords))
        return values[-1]

    setattr(adapter, name, recording)


def _replay(adapter: Adapter, name: str, values: list[Tensor]) -> None:
    calls = itertools.cycle(values)
    setattr(adapter, name, lambda *args, **keywords: next(calls))


# --- merge -----------------------------------------------------------------------------------------------------------


def _merges(trial: Trial) -> str:
    return "delta (or forward, which must agree with it)" if trial.variant.additive else "merged_weight and merged_bias"


@check(*LAYERS)
def merge_equals_forward(trial: Trial, layer: str) -> None:
    """The merged model, and the plain model that `unload(merge=True)` gives, compute what the adapted one does."""
    model, x = trial.model_and_input(layer)
    wanted = model(x)
    merge(model)
    trial.expect_equal(model(x), wanted, "the adapted model's output after merge", _merges(trial))
    unload(model, merge=True)
    left = [type(module).__name__ for module in model.modules() if isinstance(module, AdaptedLayer | Adapter)]
    trial.expect(not left, "plain layers after unload(merge=True)", f"{left}", "base_for")
    trial.expect_equal(model(x), wanted, "the adapted model's output after unload(merge=True)", _merges(trial))


@check(*LAYERS)
def unmerge_restores_the_bits(trial: Trial, layer: str) -> None:
    """After merge and unmerge, the state dict and the output are bit for bit what they were."""
    model, x = trial.model_and_input(layer)
    before, wanted = bits(model), model(x)
    merge(model)
    unmerge(model)
    changed = changed_bits(before, bits(model))
    look_at = "delta" if trial.variant.additive else "merged_weight (it must not change the W that it is given)"
    trial.expect(not changed, "every bit as before merge and unmerge", f"other bits in {changed}", look_at)
    trial.expect(torch.equal(model(x), wanted), "the output as before, bit for bit", "another one", look_at)


@check(*LAYERS)
def merges_among_other_adapters(trial: Trial, layer: str) -> None:
    """With two of its kind active, and with a LoRA before or after it, merging still equals forward."""
    for order in (["one", "two"], ["one", "lora"], ["lora", "one"]):
        model = trial.model(layer, "one", "two")
        add_adapter(model, LoRAConfig(r=2, target_modules=list(NAMES)), "lora")
        shake(model, "lora", seed=5)
        set_adapter(model, order)
        x = example_input(model)
        wanted = model(x)
        merge(model)
        names = " and then ".join("the LoRA" if name == "lora" else "one of these" for name in order)
        trial.expect_equal(model(x), wanted, f"with {names} active, merged as unmerged", _merges(trial))


@check(*LAYERS)
def adds_onto_what_it_is_given(trial: Trial, layer: str) -> None:
    """Additive: `forward(x)` is the product of x with `delta()`, and `forward(x, add)` that + add."""
    if not trial.variant.additive:
        return  # its transform is given an `add` where a LoRA acts after it: merges_among_other_adapters
    model = trial.model(layer)
    x, adapter = example_input(model), adapters_of(model)[0]
    add = torch.randn_like(trial.base(layer).get_submodule("first")(x))
    product = adapter.kind.apply(x, adapter.delta())
    trial.expect_equal(adapter(x), product, "the product of x with delta()", "forward (or delta)")
    trial.expect_equal(adapter(x, add=add), product + add, "the result without `add`, + add", "forward")


# --- dropout, shapes, dtypes -----------------------------------------------------------------------------------------


@check("linear")
def drops_in_training_only(trial: Trial, layer: str) -> None:
    """Every *_dropout of the configuration acts in training alone; dropping inputs leaves the expectation as it is."""
    for name in [field.name for field in fields(trial.config) if field.name.endswith("_dropout")]:
        model, without = trial.model(layer, **{name: 0.5}), trial.model(layer, **{name: 0.0})
        x = example_input(model)
        trial.expect_equal(model(x), without(x), f"in evaluation no effect of {name}=0.5", trial.computes)
        model.train()
        outputs = [model(x) for _ in range(20)]
        drops = any(not torch.equal(y, outputs[0]) for y in outputs)
        trial.expect(drops, f"in training with {name}=0.5 another output each time", "the same", trial.computes)
        if name not in ("rank_dropout", "module_dropout"):  # these drop a part of the update for all rows
            _check_expectation(trial, model)


def _check_expectation(trial: Trial, model: nn.Sequential) -> None:
    """Over many rows, each with a mask of its own, the first layer gives on average what it gives in evaluation."""
    layer = model.get_submodule("first")
    x = tokens(1).expand(4096, -1)
    y = layer.train()(x).double()
    error = (y.mean(0) - layer.eval()(x[:1]).double()).abs() / (y.std(0) / len(y) ** 0.5).clamp_min(1e-6)
    worst = float(error.detach().max())  # normally distributed: 5 deviations happen once in a million
    found = f"{worst:.0f} standard errors from it"
    trial.expect(worst < 5, "in training, on average, the output without dropout", found, "forward (divide by 1 - p)")


@check("linear", "nf4")
def takes_any_batch_shape(trial: Trial, layer: str) -> None:
    """No batch dimension, several, and a batch of nothing: (…, in) gives (…, out), row by row the same."""
    model = trial.model(layer)
    for shape in ((), (1,), (0,), (2, 0, 3), (2, 1, 3, 2)):
        x = tokens(*shape)
        rows = model(x.reshape(-1, 16)) if x.numel() else torch.empty(0, 8)
        expected = f"for an input {tuple(x.shape)} what its rows give one by one"
        trial.expect_equal(model(x), rows.view(*shape, 8), expected, trial.computes)


# A half-precision number is within one unit of the exact one. Each layer rounds its factors, A x, the update and the
# sum, at random and mostly by less than a unit; the variants here end 0.5 to 2 units from float64.
UNITS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@check("linear", "nf4")
def keeps_float32_on_a_half_precision_base(trial: Trial, layer: str) -> None:
    """On a bfloat16 or float16 model: float32 parameters and gradients; outputs in the input's dtype, near float64's.

    Whatever torch's default dtype is while the adapter is made.
    """
    for dtype, unit in UNITS.items():
        model = trial.base(layer).to(dtype)
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            trial.put_on(model, "default")
        finally:
            torch.set_default_dtype(default)
        shake(model)
        parameters = adapter_parameters(model)
        for name, parameter in parameters.items():
            found = f"{name} in {parameter.dtype}"
            trial.expect(parameter.dtype == torch.float32, f"float32 parameters on a {dtype} base", found, "__init__")
        x = example_input(model).to(dtype)
        y = model(x)
        trial.expect(y.dtype == dtype, f"an output in the input's {dtype}", f"{y.dtype}", trial.computes)
        exact = in_float64(copy.deepcopy(model))(x.double())
        trial.expect_equal(y, exact, f"in {dtype} nearly what float64 gives", trial.computes, tolerance=4 * unit)
        y.float().pow(2).sum().backward()
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                gradient = parameter.grad
                finite = gradient is not None and bool(gradient.isfinite().all())
                trial.expect(finite, f"a finite gradient of {name} on a {dtype} base", f"{gradient}", trial.computes)


@check("linear", "nf4")
def works_under_autocast(trial: Trial, layer: str) -> None:
    """Under autocast to bfloat16: the dtype that the base model gives, near the float32 output, float32 gradients."""
    model, x = trial.model_and_input(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        with disable_adapters(model):
            base = model(x)
    trial.expect(y.dtype == base.dtype, f"the base model's {base.dtype}", f"{y.dtype}", trial.computes)
    tolerance = 8 * UNITS[torch.bfloat16]  # here W and x are rounded too
    trial.expect_equal(y, model(x), "under autocast nearly the float32 output", trial.computes, tolerance)
    y.float().pow(2).sum().backward()
    for name, parameter in trained(model).items():
        found = "none" if parameter.grad is None else f"{parameter.grad.dtype}"
        trial.expect(found == "torch.float32", f"a float32 gradient of {name}", found, trial.computes)


@check(*LAYERS)
def disabled_is_the_base_bit_for_bit(trial: Trial, layer: str) -> None:
    """Inside `disable_adapters`, merged or not, and after `unload`, the model is the base model to the last bit."""
    base, model = trial.base(layer), trial.model(layer)
    x = example_input(base)
    wanted, acting = base(x), model(x)
    look_at = "__init__ (it must leave the layer as it is)"
    for merged in (False, True):
        if merged:
            merge(model)
        with disable_adapters(model):
            found = distance(model(x), wanted)
            state = "merged and disabled" if merged else "disabled"
            trial.expect(torch.equal(model(x), wanted), f"{state}: the base", f"an error of {found:.1e}", look_at)
    unmerge(model)
    trial.expect(torch.equal(model(x), acting), "enabled again, the same output as before", "another", trial.computes)
    unload(model)
    changed = changed_bits(bits(base), bits(model))
    trial.expect(not changed, "after unload, the base layers", f"other bits in {changed}", look_at)
