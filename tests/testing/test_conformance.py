"""The conformance suite: every variant here passes it, and every check of it catches a variant that is broken."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora.testing
from minilora.adapters import adapter as registry
from minilora.adapters.adapter import AdapterConfig
from minilora.adapters.attach import add_adapter
from minilora.adapters.initialization import initializations
from minilora.adapters.layer_kinds import EmbeddingKind
from minilora.adapters.lora import LoRA
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError
from minilora.nf4.linear import NF4Linear
from minilora.testing import Add, arithmetic, life
from minilora.testing.trial import CHECKS, Check
from minilora.variants import eva, lora_ga
from minilora.variants.adalora import AdaLoRAConfig
from minilora.variants.ia3 import IA3Config
from minilora.variants.loha import LoHaConfig
from minilora.variants.lokr import LoKrConfig
from minilora.variants.vera import VeRAConfig

# --- every variant passes every check --------------------------------------------------------------------------------

VARIANTS: dict[str, AdapterConfig] = {
    "lora": LoRAConfig(r=4, lora_dropout=0.1),
    "rslora": LoRAConfig(r=4, use_rslora=True, init_lora_weights="gaussian"),
    "dora": LoRAConfig(r=4, use_dora=True, lora_dropout=0.1),
    "lora, biases": LoRAConfig(r=4, bias="lora_only"),
    "dora, biases": LoRAConfig(r=4, use_dora=True, bias="all"),
    "lora, a bias of B": LoRAConfig(r=4, lora_bias=True, lora_dropout=0.1),
    "pissa": LoRAConfig(r=4, init_lora_weights="pissa"),
    "pissa, fast": LoRAConfig(r=4, init_lora_weights="pissa_niter_4", lora_dropout=0.1),
    "olora": LoRAConfig(r=4, init_lora_weights="olora"),
    "loftq": LoRAConfig(r=4, init_lora_weights="loftq"),
    "orthogonal": LoRAConfig(r=4, init_lora_weights="orthogonal"),
    "eva": LoRAConfig(r=2, init_lora_weights="eva", eva_config={"rho": 1}),
    "lora-ga": LoRAConfig(r=3, init_lora_weights="lora_ga"),
    "adalora": AdaLoRAConfig(init_r=4, target_r=2, lora_alpha=32, total_step=200, lora_dropout=0.1),
    "vera": VeRAConfig(r=6, vera_dropout=0.1),
    "vera, projections drawn again": VeRAConfig(r=6, save_projection=False),
    "ia3": IA3Config(feedforward_modules=["second"]),
    "loha": LoHaConfig(r=3),
    "loha, dropout": LoHaConfig(r=3, rank_dropout=0.1, module_dropout=0.1, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=2, init_weights="lycoris", use_effective_conv2d=True),
    "lokr, both": LoKrConfig(r=1, decompose_both=True, decompose_factor=4),
}

EXCEPTIONS: dict[str, dict[str, str]] = {
    "lora, a bias of B": {"adds_onto_what_it_is_given": "its update is a product and a bias"},
    "loftq": {
        "starts_as_the_base_model": "it starts between W and NF4(W)",
        "takes_or_refuses_each_kind_of_layer": "it quantizes itself, and refuses 4 bits",
        "disabled_is_the_base_bit_for_bit": "it gives up W for a quantized base of its own",
        **dict.fromkeys(
            [
                "merges_among_other_adapters",
                "leaves_the_base_frozen",
                "shares_no_parameter",
                "several_live_on_one_base",
                "serves_each_row_its_own_adapter",
            ],
            "a second one finds no W to start from",
        ),
    },
}


def add_with_data(initialize: Callable[..., None]) -> Add:
    """What puts an adapter on a model that starts from batches of data, or from their gradients."""

    def add(model: nn.Module, config: AdapterConfig, name: str) -> None:
        add_adapter(model, config, name)
        x = minilora.testing.example_input(model)
        initialize(model, [x], name, forward=lambda model, x: model(x).pow(2).mean())

    return add


ADD = {"eva": add_with_data(eva.initialize), "lora-ga": add_with_data(lora_ga.initialize)}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes(variant: str, check: Check) -> None:
    check(VARIANTS[variant], add=ADD.get(variant, add_adapter), exceptions=EXCEPTIONS.get(variant, {}))


def test_no_variant_is_left_out() -> None:
    here = {variant for variant in registry._variants if variant.__module__.startswith("minilora.")}
    assert {registry.adapter_class(config) for config in VARIANTS.values()} == here
    starts = [config.init_lora_weights for config in VARIANTS.values() if isinstance(config, LoRAConfig)]
    for name in initializations:
        assert any(re.fullmatch(name, str(start)) for start in starts), name


def test_an_exception_must_be_declared_and_must_be_one() -> None:
    check, config = arithmetic.starts_as_the_base_model, LoRAConfig(r=4, init_lora_weights=False)
    with pytest.raises(AssertionError, match="starts_as_the_base_model: LoRA on linear: expected"):
        check(config)
    declared = {"starts_as_the_base_model": "init_lora_weights=False is for tests"}
    minilora.testing.check_variant(config, exceptions=declared)
    with pytest.raises(AssertionError, match="LoRA passes; remove it from the exceptions"):
        check(LoRAConfig(r=4), exceptions=declared)


def test_it_is_importable_with_torch_alone(tmp_path: Path) -> None:
    program = """
import sys
for name in ("pytest", "hypothesis", "transformers", "peft", "bitsandbytes"):
    sys.modules[name] = None  # an import of it fails
import minilora.testing
from minilora import LoRAConfig
minilora.testing.check_variant(LoRAConfig(r=2))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- every check catches something -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BrokenConfig(LoRAConfig):
    peft_type: ClassVar[str] = "BROKEN"


BROKEN: list[tuple[Check, str, type[LoRA]]] = []  # a check, a part of its message, and a variant that it catches


def caught_by(check: Check, message: str) -> Callable[[type[LoRA]], type[LoRA]]:
    """Class decorator: this variant is broken, and `check` says so in these words."""

    def remember(variant: type[LoRA]) -> type[LoRA]:
        variant.config_class = BrokenConfig
        BROKEN.append((check, message, variant))
        return variant

    return remember


class Spoilt(LoRA):
    """A LoRA to which something is done once it is made."""

    def __init__(self, layer: nn.Module, config: LoRAConfig, path: str = "") -> None:
        super().__init__(layer, config, path)
        self.spoil(layer, path)

    def spoil(self, layer: nn.Module, path: str) -> None:
        raise NotImplementedError


@caught_by(arithmetic.starts_as_the_base_model, "look at StartsElsewhere.__init__")
class StartsElsewhere(Spoilt):
    def spoil(self, layer: nn.Module, path: str) -> None:
        nn.init.normal_(self.lora_B)


@caught_by(arithmetic.starts_as_the_base_model, "look at TakesNoAdd.forward")
class TakesNoAdd(LoRA):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # the caller is torch's _call_impl
        return super().forward(x)


@caught_by(arithmetic.gradients_equal_finite_differences, "the gradient of first.lora_B that finite differences give")
class HalfAGradient(LoRA):
    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, (B + B.detach()) / 2


@caught_by(arithmetic.gradients_equal_finite_differences, "expected no gradient through extra_repr; found the whole")
class DeclaresWhatIsNotSo(LoRA):
    held_constant = ("extra_repr",)


@caught_by(arithmetic.merge_equals_forward, "after merge")
class MergesTwice(LoRA):
    def delta(self) -> Tensor:
        return 2 * super().delta()


@caught_by(arithmetic.unmerge_restores_the_bits, "look at MergesIntoTheWeightItself.delta")
class MergesIntoTheWeightItself(LoRA):
    def merged_weight(self, W: Tensor) -> Tensor:
        return W.add_(self.delta())


@caught_by(arithmetic.merges_among_other_adapters, "with one of these and then one of these active, merged as unmerged")
class MergesOntoTheWeightItRemembers(Spoilt):
    def spoil(self, layer: nn.Module, path: str) -> None:
        self.register_buffer("W", self.kind.weight(layer).detach().clone())

    def merged_weight(self, W: Tensor) -> Tensor:
        return self.W + self.delta()


@caught_by(arithmetic.adds_onto_what_it_is_given, "the result without `add`, + add")
class ForgetsWhatItIsGiven(LoRA):
    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return super().forward(x)


@caught_by(arithmetic.drops_in_training_only, "in evaluation no effect of lora_dropout")
class DropsAlways(LoRA):
    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        x = F.dropout(x, self.config.lora_dropout) if x.is_floating_point() else x
        return super().forward(x, add)


@caught_by(arithmetic.drops_in_training_only, "another output each time; found the same")
class NeverDrops(LoRA):
    def train(self, mode: bool = True) -> "NeverDrops":
        return super().train(False)


@caught_by(arithmetic.drops_in_training_only, "on average, the output without dropout")
class DropsWithoutScaling(LoRA):
    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        kept = 1 - self.config.lora_dropout if self.training else 1
        return super().forward(x * kept if x.is_floating_point() else x, add)


@caught_by(arithmetic.takes_any_batch_shape, "look at TakesBatchesOnly.forward")
class TakesBatchesOnly(LoRA):
    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = super().forward(x.view(x.shape[0], -1, x.shape[-1]))
        y = y.view(*x.shape[:-1], -1)
        return y if add is None else y + add


@caught_by(arithmetic.keeps_float32_on_a_half_precision_base, "float32 parameters on a torch.bfloat16 base")
class TakesTheDtypeOfTheBase(Spoilt):
    def spoil(self, layer: nn.Module, path: str) -> None:
        if layer.weight.is_floating_point():
            self.to(layer.weight.dtype)


@caught_by(arithmetic.keeps_float32_on_a_half_precision_base, "nearly what float64 gives")
class LosesDigits(LoRA):
    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = super().forward(x) + 100 - 100
        return y if add is None else y + add


@caught_by(arithmetic.works_under_autocast, "look at MixesDtypesUnderAutocast.forward")
class MixesDtypesUnderAutocast(LoRA):
    """Products are bfloat16 under autocast, and what is made in the dtype of x is not."""

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        y = torch.zeros_like(y, dtype=x.dtype).index_add(0, torch.arange(len(y)), y)
        return y if add is None else y + add


@caught_by(arithmetic.disabled_is_the_base_bit_for_bit, "disabled: the base")
class ChangesTheBase(Spoilt):
    """PEFT starts PiSSA and OLoRA like this."""

    def spoil(self, layer: nn.Module, path: str) -> None:
        nn.init.normal_(self.lora_B)
        if layer.weight.is_floating_point():
            layer.weight.data -= self.kind.stored(self.delta().detach()).to(layer.weight)


@caught_by(life.takes_or_refuses_each_kind_of_layer, "found ValueError: no embeddings")
class RefusesWithAnotherError(Spoilt):
    def spoil(self, layer: nn.Module, path: str) -> None:
        if isinstance(self.kind, EmbeddingKind):
            raise ValueError("no embeddings")


@caught_by(life.takes_or_refuses_each_kind_of_layer, "one line that names the layer")
class RefusesNoLayerByName(Spoilt):
    def spoil(self, layer: nn.Module, path: str) -> None:
        if isinstance(self.kind, EmbeddingKind):
            raise InputError("no embeddings")


@caught_by(life.takes_or_refuses_each_kind_of_layer, "expected an adapter on nf4 layers; found 'first is in 4 bits'")
class RefusesNF4(Spoilt):
    def spoil(self, layer: nn.Module, path: str) -> None:
        if isinstance(layer, NF4Linear):
            raise InputError(f"{path} is in 4 bits")


@caught_by(life.trains, "a loss that falls")
class TakesNoPart(LoRA):
    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, B.detach()


@caught_by(life.trains, "no change in ['first.unused', 'second.unused']")
class HasAnUnusedParameter(Spoilt):
    def spoil(self, layer: nn.Module, path: str) -> None:
        self.unused = nn.Parameter(torch.zeros(3))


@caught_by(life.leaves_the_base_frozen, "it must not keep the layer as a submodule")
class KeepsTheLayer(Spoilt):
    def spoil(self, layer: nn.Module, path: str) -> None:
        self.layer = layer


@caught_by(life.shares_no_parameter, "first.lora_A of adapter 'two' in the memory of first.lora_A of adapter 'one'")
class SharesA(Spoilt):
    known: ClassVar[dict[tuple[int, ...], nn.Parameter]] = {}

    def spoil(self, layer: nn.Module, path: str) -> None:
        self.lora_A = self.known.setdefault(tuple(self.lora_A.shape), self.lora_A)


@caught_by(life.works_under_gradient_checkpointing, "another gradient of first.adapters.default.lora_A")
class CountsItsCalls(LoRA):
    calls = 0

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        self.calls += 1
        y = super().forward(x) * (1 + self.calls)
        return y if add is None else y + add


@caught_by(life.several_live_on_one_base, "what this adapter gives when it is alone")
class UsesTheLatest(Spoilt):
    latest: ClassVar[dict[tuple[int, ...], "UsesTheLatest"]] = {}

    def spoil(self, layer: nn.Module, path: str) -> None:
        self.latest[self.kind.shape] = self

    def factors(self) -> tuple[Tensor, Tensor]:
        return LoRA.factors(self.latest[self.kind.shape])


@caught_by(life.serves_each_row_its_own_adapter, "row 2 of a mixed batch as 'two' alone")
class MixesRows(LoRA):
    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        y = y - y.mean(0)
        return y if add is None else y + add


@caught_by(life.deepcopies, "a copy that follows its own parameters")
class HoldsAClosure(Spoilt):
    def spoil(self, layer: nn.Module, path: str) -> None:
        self.compute = lambda: LoRA.factors(self)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.compute()


@caught_by(life.state_dict_holds_everything, "the same output after load_state_dict")
class HidesARandomTensor(Spoilt):
    def spoil(self, layer: nn.Module, path: str) -> None:
        self.hidden = [torch.randn(self.r)]

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, B * self.hidden[0].view(-1, *[1] * (B.dim() - 2)).to(B)


@caught_by(life.moves_to_dtypes_and_devices, "look at StaysOnItsDevice.forward")
class StaysOnItsDevice(Spoilt):
    def spoil(self, layer: nn.Module, path: str) -> None:
        self.scale = torch.ones(self.kind.out_features)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = super().forward(x) * self.scale
        return y if add is None else y + add


@caught_by(life.compiles_without_a_graph_break, "look at AsksForANumber.forward")
class AsksForANumber(LoRA):
    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return super().forward(x if float(x.sum()) < 1e30 else x / 2, add)


@caught_by(life.saves_and_loads, "look at GivesTwoParametersOneName.peft_name")
class GivesTwoParametersOneName(LoRA):
    def peft_name(self, name: str) -> str:
        return "lora.weight"


@pytest.mark.parametrize(
    ("check", "message", "variant"),
    BROKEN,
    ids=[f"{check.__name__}-{variant.__name__}" for check, _, variant in BROKEN],
)
def test_a_broken_variant_is_caught(
    check: Check, message: str, variant: type[LoRA], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_variants", [*registry._variants, variant])
    with pytest.raises(AssertionError) as caught:
        check(BrokenConfig(r=4))
    text = str(caught.value)
    assert message in text, text
    assert text.startswith(f"{check.__name__}: {variant.__name__} on ")
    assert all(word in text for word in ("expected", "; found ", f"; look at {variant.__name__}."))


def test_every_check_is_shown_to_catch_something() -> None:
    assert {check.__name__ for check in CHECKS} == {check.__name__ for check, _, _ in BROKEN}


def test_what_is_not_broken_passes_where_the_broken_variants_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = type("Whole", (LoRA,), {"config_class": BrokenConfig})
    monkeypatch.setattr(registry, "_variants", [*registry._variants, variant])
    minilora.testing.check_variant(BrokenConfig(r=4))
