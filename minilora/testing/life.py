"""Checks of what happens to a variant in use: added, trained, named, copied, moved, compiled, saved and loaded."""

import copy
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.adapters import (
    BASE,
    AdaptedLayer,
    adapters_for_rows,
    after_step,
    disable_adapters,
    regularization,
    set_adapter,
    trainable_parameters,
)
from minilora.errors import InputError
from minilora.formats import load_adapter, save_adapter
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
    shake,
    trained,
)


@check("linear")
def takes_or_refuses_each_kind_of_layer(trial: Trial, layer: str) -> None:
    """nn.Linear and NF4Linear it takes; another kind it may refuse: with one InputError that names the layer.

    The model then stays as it was. The other checks leave the kinds out that the variant refuses.
    """
    for kind in LAYERS:
        model = trial.base(kind)
        before = bits(model)
        try:
            trial.put_on(model, "default")
        except InputError as error:
            message = str(error)
            trial.expect(kind not in ("linear", "nf4"), f"an adapter on {kind} layers", repr(message), "__init__")
            named = NAMES[0] in message or NAMES[1] in message
            expected = f"on {kind} layers, one line that names the layer (its path is an argument)"
            trial.expect(named and "\n" not in message, expected, repr(message), "__init__")
            changed = changed_bits(before, bits(model))
            trial.expect(not changed, f"an unchanged {kind} model after the InputError", f"{changed}", "__init__")
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            trial.expect(False, f"an adapter on {kind} layers, or an InputError", found, "__init__")


# --- training --------------------------------------------------------------------------------------------------------


def _train(model: nn.Module, x: Tensor, target: Tensor, steps: int) -> list[float]:
    """The loss before each step of Adam on the trainable parameters, with all that training does for a variant."""
    optimizer = torch.optim.Adam(trainable_parameters(model).values(), lr=1e-2)
    losses = []
    for step in range(1, steps + 1):
        loss = F.mse_loss(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + regularization(model)).backward()
        optimizer.step()
        after_step(model, step)
    return losses


@check("linear", "nf4")
def trains(trial: Trial, layer: str) -> None:
    """In 50 steps towards what another adapter of its kind computes, the loss falls and every parameter moves."""
    model, teacher = trial.base(layer), trial.model(layer)
    trial.put_on(model, "default")
    x = example_input(model)
    parameters = trained(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    trial.expect(bool(before), "parameters that require a gradient", "none", "__init__")
    losses = _train(model, x, teacher(x).detach(), steps=50)
    found = f"{losses[0]:.3g} at the start and {losses[-1]:.3g} at the end"
    trial.expect(losses[-1] < 0.9 * losses[0], "a loss that falls by a tenth or more", found, trial.computes)
    idle = [name for name, parameter in parameters.items() if torch.equal(parameter, before[name])]
    look_at = f"{trial.computes} (does it take part?)"
    trial.expect(not idle, "every trained parameter to move", f"no change in {idle}", look_at)


@check("linear", "nf4", "embedding")
def leaves_the_base_frozen(trial: Trial, layer: str) -> None:
    """Adding two adapters and training one changes no bit of the base model and gives it no gradient."""
    base, model = trial.base(layer), trial.model(layer, "one", "two")
    x = example_input(base)
    _train(model, x, torch.zeros_like(base(x)), steps=2)
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            in_training = [
                key for key, p in module.base_layer.named_parameters() if p.requires_grad or p.grad is not None
            ]
            look_at = "__init__ (it must not keep the layer as a submodule)"
            trial.expect(not in_training, f"a frozen base layer {name}", f"{in_training} in training", look_at)
    own = {key.replace("base_layer.", ""): value for key, value in bits(model).items() if ".adapters." not in key}
    changed = changed_bits(bits(base), own)
    trial.expect(not changed, "the bits of the base model", f"others in {changed}", "__init__")


@check("linear")
def shares_no_parameter(trial: Trial, layer: str) -> None:
    """What one adapter trains is nobody else's memory: not the base's, and not another adapter's."""
    model = trial.model(layer, "one", "two")
    owners = {_place(p): f"the base's {key}" for key, p in model.named_parameters() if ".adapters." not in key}
    for adapter_name in ("one", "two"):
        for path, adapter in zip(NAMES, adapters_of(model, adapter_name), strict=True):
            for key, parameter in adapter.named_parameters():
                place, owner = _place(parameter), f"{path}.{key} of adapter {adapter_name!r}"
                found = f"{owner} in the memory of {owners.get(place)}"
                trial.expect(place not in owners, "memory of its own for each parameter", found, "__init__ or share")
                owners[place] = owner


def _place(parameter: Tensor) -> int:
    return parameter.untyped_storage().data_ptr()


@check("linear", "nf4")
def works_under_gradient_checkpointing(trial: Trial, layer: str) -> None:
    """Recomputed in backward, with the dropout of the configuration, every gradient is bit for bit the same."""
    for use_reentrant in (False, True):
        model = trial.model(layer).train()
        plain, recomputed = (_gradients(model, reentrant) for reentrant in (None, use_reentrant))
        for name, gradient in plain.items():
            found = f"another gradient of {name} (use_reentrant={use_reentrant})"
            same, look_at = torch.equal(gradient, recomputed[name]), f"{trial.computes} (does it give the same twice?)"
            trial.expect(same, "the gradients that are found without checkpointing", found, look_at)


def _gradients(model: nn.Module, use_reentrant: bool | None) -> dict[str, Tensor]:
    """Of the trained parameters, from the same random numbers; None means without checkpointing."""
    x = example_input(model).requires_grad_()
    torch.manual_seed(1)
    y = model(x) if use_reentrant is None else checkpoint(model, x, use_reentrant=use_reentrant)
    model.zero_grad()
    y.pow(2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- several on one base ---------------------------------------------------------------------------------------------


@check(*LAYERS)
def several_live_on_one_base(trial: Trial, layer: str) -> None:
    """Each of two acts as if it were alone, whatever was active before; both at once add up where they are additive."""
    both = trial.model(layer, "one", "two")
    x = example_input(both)
    alone = {name: _alone(trial, layer, both, name)(x) for name in ("one", "two")}
    for name in ("one", "two", "one"):
        set_adapter(both, name)
        found = f"an error of {distance(both(x), alone[name]):.1e}"
        expected = f"after set_adapter({name!r}) what this adapter gives when it is alone"
        look_at = "__init__ (is something kept in the class, or drawn at random and not in the state dict?)"
        trial.expect(torch.equal(both(x), alone[name]), expected, found, look_at)
    if trial.variant.additive:
        first = both.get_submodule("first")
        base, updates = trial.base(layer).get_submodule("first")(x), torch.tensor(0.0)
        for name in ("one", "two"):
            set_adapter(both, name)
            updates = updates + (first(x) - base)
        set_adapter(both, ["one", "two"])
        trial.expect_equal(first(x), base + updates, "with both active, the sum of their updates", "forward")


def _alone(trial: Trial, layer: str, model: nn.Module, name: str) -> nn.Module:
    """A model with a copy of this one adapter."""
    alone = trial.model(layer, name)
    for mine, other in zip(adapters_of(alone, name), adapters_of(model, name), strict=True):
        mine.load_state_dict(other.state_dict())
    return alone


@check(*LAYERS)
def serves_each_row_its_own_adapter(trial: Trial, layer: str) -> None:
    """Inside `adapters_for_rows`, each row of the batch is what its adapter, or the base, gives alone."""
    model, x = trial.model_and_input(layer, "one", "two")
    x = torch.cat([x, x])
    with disable_adapters(model):
        alone = {BASE: model(x)}
    for name in ("one", "two"):
        set_adapter(model, name)
        alone[name] = model(x)
    names = ["one", BASE, "two", "one"]
    with adapters_for_rows(model, names):
        y = model(x)
    for row, name in enumerate(names):
        trial.expect_equal(y[row], alone[name][row], f"row {row} of a mixed batch as {name!r} alone", trial.computes)


# --- as a module -----------------------------------------------------------------------------------------------------


@check("linear", "nf4")
def deepcopies(trial: Trial, layer: str) -> None:
    """A copy computes the same, from parameters of its own: to change the copy leaves the original alone."""
    model, x = trial.model_and_input(layer)
    wanted, twin = model(x), copy.deepcopy(model)
    trial.expect(torch.equal(twin(x), wanted), "a copy that computes the same", "another output", "__init__")
    shake(twin, seed=7)
    look_at = "__init__ (a closure or a list that holds the original's parameters?)"
    trial.expect(torch.equal(model(x), wanted), "the original as it was", "that changing the copy changed it", look_at)
    follows = not torch.equal(twin(x), wanted)
    trial.expect(follows, "a copy that follows its own parameters", "the same output with others", look_at)


@check(*LAYERS)
def state_dict_holds_everything(trial: Trial, layer: str) -> None:
    """The state dict of one model, loaded into another with other weights and a new adapter, gives the same output."""
    model, x = trial.model_and_input(layer)
    other = trial.base(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    trial.put_on(other, "default")
    other.load_state_dict(model.state_dict())
    look_at = "__init__ (is all that forward uses a parameter or a registered buffer?)"
    trial.expect_equal(other(x), model(x), "the same output after load_state_dict", look_at, tolerance=1e-6)


@check("linear")
def moves_to_dtypes_and_devices(trial: Trial, layer: str) -> None:
    """All of it follows .to(): in float64 it computes the same, and on another device ("meta") nothing stays behind."""
    model, x = trial.model_and_input(layer)
    wanted = model(x)
    double = copy.deepcopy(model).double()(x.double())
    trial.expect(double.dtype == torch.float64, "float64 from .double()", f"{double.dtype}", trial.computes)
    trial.expect_equal(double, wanted, "the same output in float64", trial.computes)
    devices = ["meta", "cuda"] if torch.cuda.is_available() else ["meta"]
    for device in devices:
        y = copy.deepcopy(model).to(device)(x.to(device))
        trial.expect(y.device.type == device, f"an output on {device}", f"one on {y.device}", "__init__")
        if device != "meta":
            trial.expect_equal(y.cpu(), wanted, f"the same output on {device}", trial.computes)


@check("linear", "nf4")
def compiles_without_a_graph_break(trial: Trial, layer: str) -> None:
    """torch.compile(fullgraph=True) of an adapted layer gives the same output and gradients.

    The "eager" backend traces only: what it takes, a compiling one can.
    """
    model = trial.model(layer)
    first, x = model.get_submodule("first"), example_input(model)
    torch._dynamo.reset()  # earlier layers count against the limit of recompilations
    compiled = torch.compile(first, backend="eager", fullgraph=True)
    wanted, y = first(x), compiled(x)
    trial.expect_equal(y, wanted, "the same output compiled", trial.computes)
    parameters = [parameter for parameter in first.parameters() if parameter.requires_grad]
    eager, traced = (torch.autograd.grad(output.pow(2).sum(), parameters) for output in (wanted, y))
    for mine, other in zip(traced, eager, strict=True):
        trial.expect_equal(mine, other, "the same gradients compiled", trial.computes)


@check(*LAYERS)
def saves_and_loads(trial: Trial, layer: str) -> None:
    """`save_adapter`, then `load_adapter` on a plain model: the same output, and it trains on."""
    model, other = trial.model(layer), trial.base(layer)
    x = example_input(model)
    wanted = model(x)
    look_at = "peft_name (one key for each parameter) and the config's fields (all but the parameters is made of them)"
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        trial.expect(torch.equal(model(x), wanted), "a model that saving leaves alone", "another output", look_at)
        load_adapter(other, folder)
    trial.expect_equal(other(x), wanted, "the saved adapter's output after load_adapter", look_at)
    trial.expect(bool(trained(other)), "a loaded adapter that trains on", "nothing requires a gradient", "__init__")
