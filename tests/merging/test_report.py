"""The merge report, against float64, against what `merge` really writes, and against bitsandbytes."""

import copy
import importlib
import io
import json
import math
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from minilora.adapters.attach import add_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.merge import merge
from minilora.errors import InputError
from minilora.merging.report import ERASED, MergeReport, compare_changes, merge_report, read_back
from minilora.nf4.linear import NF4Linear
from minilora.variants.adalora import AdaLoRAConfig
from minilora.variants.ia3 import IA3Config
from minilora.variants.loha import LoHaConfig
from minilora.variants.lokr import LoKrConfig
from minilora.variants.vera import VeRAConfig

module = importlib.import_module("minilora.merging.report")  # minilora.merge_report itself is the function

IN, OUT = 128, 64


def adapted_model(base: nn.Module, rms: float = 1e-3, r: int = 8, seed: int = 0) -> nn.Sequential:
    """The layer with a LoRA whose change has this rms."""
    torch.manual_seed(seed)
    model = nn.Sequential(base)
    add_adapter(model, LoRAConfig(r=r, lora_alpha=r, target_modules=["0"]))
    adapter = model[0].adapters["default"]
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        adapter.lora_B *= rms / adapter.delta().square().mean().sqrt()
    return model


def gaussian_linear(out: int = OUT, inputs: int = IN, std: float = 0.02, **options: Any) -> nn.Linear:
    torch.manual_seed(1)
    linear = nn.Linear(inputs, out, bias=False, **options)
    nn.init.normal_(linear.weight, std=std)
    return linear


def oracle(D: Tensor, R: Tensor) -> tuple[float, float, float]:
    """Kept, cosine and relative error."""
    D, R = D.detach().double().flatten(), R.detach().double().flatten()
    return float(D @ R / (D @ D)), float(D @ R / (D.norm() * R.norm())), float((R - D).norm() / D.norm())


def values(report: MergeReport, format: str) -> tuple[float, float, float]:
    (row,) = report.of(format)
    return row.kept, row.cosine, row.relative_error


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("nf4", [False, True])
def test_the_rows_are_those_of_what_merge_writes(format: str, nf4: bool) -> None:
    dtype = getattr(torch, format)
    base = gaussian_linear().to(dtype)
    base = NF4Linear.from_linear(base, compute_dtype=dtype) if nf4 else base
    model = adapted_model(base, rms=3e-4)
    W = model[0].kind.weight(base).double()
    D = copy.deepcopy(model[0].adapters["default"]).double().delta()
    report = merge_report(model, [format])
    merge(model)
    in_format = W.to(dtype).double()  # the base as this format holds it
    expected = oracle(D, model[0].base_layer.weight.double() - in_format)
    assert values(report, format) == pytest.approx(expected, rel=1e-6)  # the error's last digits cancel: 1 − 1e-12
    (row,) = report.rows
    assert row.rms == pytest.approx(3e-4, rel=1e-5)  # adapted_model scales B in float32
    assert row.rms_of_base == pytest.approx(W.square().mean().sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("base_kind", ["nf4", "dense"])
def test_the_nf4_rows_are_those_of_requantizing_with_bitsandbytes(base_kind: str, double_quant: bool) -> None:
    functional = pytest.importorskip("bitsandbytes").functional

    def requantized(W: Tensor) -> Tensor:
        return functional.dequantize_4bit(
            *functional.quantize_4bit(W.detach(), blocksize=64, compress_statistics=double_quant, quant_type="nf4")
        )

    if base_kind == "dense" and not double_quant:
        pytest.skip("a dense base is quantized as `load` does by default: with double quantization")
    linear = gaussian_linear()
    base = NF4Linear.from_linear(linear, double_quant=double_quant) if base_kind == "nf4" else linear
    model = adapted_model(base)
    W = model[0].kind.weight(base)
    reference = W if base_kind == "nf4" else requantized(W)
    D = copy.deepcopy(model[0].adapters["default"]).double().delta()
    expected = oracle(D, requantized(W + D.float()) - reference)
    # float32 W + Δ here, and the adapter's own sum there, may round a weight at a midpoint to another code
    assert values(merge_report(model, ["nf4"]), "nf4") == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("name", ["q8_0", "q4_1"])
def test_the_rows_of_a_gguf_type_are_those_of_rounding_to_it(name: str) -> None:
    model = adapted_model(gaussian_linear())
    W, kind = model[0].base_layer.weight, gguf.GGMLQuantizationType[name.upper()]
    D = copy.deepcopy(model[0].adapters["default"]).double().delta()
    merged, base = (
        torch.from_numpy(gguf.dequantize(gguf.quantize(w.detach().numpy(), kind), kind)) for w in (W + D.float(), W)
    )
    # as with NF4, a weight at a midpoint may be rounded to another code
    assert values(merge_report(model, [name]), name) == pytest.approx(oracle(D, merged - base), abs=2e-3)
    with pytest.raises(InputError, match=f"rows of 33 numbers, and {name} takes"):
        merge_report(adapted_model(gaussian_linear(8, 33)), [name])


# What was reported for weights N(0, 0.02²) requantized with a float32 absmax: the rms of the change, and the cosine.
# With double quantization the first two are 0.02 and 0.06: rounding the absmax anew adds noise of its own.
REPORTED = {1e-4: 0.03, 5e-4: 0.06, 1e-3: 0.39, 2e-3: 0.74}


@pytest.mark.parametrize("rms", REPORTED)
def test_small_changes_are_erased_by_requantizing_as_reported(rms: float) -> None:
    base = NF4Linear.from_linear(gaussian_linear(768, 768), double_quant=False)
    report = merge_report(adapted_model(base, rms), ["float32", "nf4"])
    # 0.6 million weights in 9,216 blocks, whose maxima decide the step: another draw moves the third digit, by 10% of
    # the smallest value, and the reported numbers have two digits.
    kept, cosine, _ = values(report, "nf4")
    assert cosine == pytest.approx(REPORTED[rms], abs=0.012)
    assert bool(report.warnings) == (kept < ERASED) == (rms < 2e-3)
    assert values(report, "float32")[1] > 1 - 1e-6


def test_noise_that_hides_the_change_is_not_erasure() -> None:
    """Off the grid of bfloat16 a tiny change arrives in the mean, on the grid it is rounded away: same W, nearly."""
    nf4 = NF4Linear.from_linear(gaussian_linear(512, 512))
    dense = nn.Linear(512, 512, bias=False)
    dense.weight.data = nf4.dequantize().bfloat16()
    off = merge_report(adapted_model(nf4, rms=1e-5), ["bfloat16"])
    on = merge_report(adapted_model(dense, rms=1e-5), ["bfloat16"])
    kept, cosine, _ = values(off, "bfloat16")
    # each weight moves by whole steps of some 8e-5, up or down; over 262,144 of them the mean is good to 1%
    assert (kept, cosine < 0.7, off.warnings) == (pytest.approx(1, abs=0.05), True, [])
    assert values(on, "bfloat16")[0] < 0.5
    assert "merge into float32" in on.warnings[0]


def test_a_dense_base_is_compared_as_the_format_holds_it() -> None:
    """Against W itself a 4-bit model would seem to lose everything, with the change far above what it loses."""
    model = adapted_model(gaussian_linear(256, 256), rms=4e-3)
    layer = model[0]
    W, merged = layer.base_layer.weight, layer.merged_weight()[0]
    *_, error_against_w = compare_changes(merged - W, read_back(merged, "nf4", layer), W)
    found = values(merge_report(model, ["nf4"]), "nf4")
    requantized = read_back(merged, "nf4", layer) - read_back(W, "nf4", layer)
    assert found == pytest.approx(oracle(merged - W, requantized), abs=1e-5)
    assert found[-1] != pytest.approx(error_against_w, rel=0.05)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), chunk=st.integers(1, 50), seed=st.integers(0, 99), noise=st.sampled_from([0.0, 1e-3, 1.0]))
def test_piecewise_sums_are_those_of_the_whole(n: int, chunk: int, seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    D, base, error = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    R = D + noise * error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        found = compare_changes(D, base + R, base)
    assert found == pytest.approx(oracle(D, R), rel=1e-9, abs=1e-12)


VARIANTS = [
    LoRAConfig(r=4, use_rslora=True, target_modules=["0"]),
    LoRAConfig(r=4, use_dora=True, target_modules=["0"]),
    LoHaConfig(r=4, target_modules=["0"]),
    LoKrConfig(r=4, target_modules=["0"]),
    VeRAConfig(r=4, target_modules=["0"]),
    IA3Config(target_modules=["0"], feedforward_modules=[]),
    AdaLoRAConfig(target_modules=["0"], total_step=10),
]


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: f"{type(config).__name__}-{config.peft_type}")
def test_any_variant_can_be_looked_at(config: Any) -> None:
    model = nn.Sequential(NF4Linear.from_linear(gaussian_linear()))
    add_adapter(model, config)
    for parameter in model[0].adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = merge_report(model)
    assert [row.format for row in report.rows] == ["float32", "bfloat16", "float16", "nf4"]
    merged = model[0].merged_weight()[0].double()
    W = model[0].kind.weight(model[0].base_layer).double()
    for row in report.rows:
        assert row.rms == pytest.approx((merged - W).square().mean().sqrt().item(), rel=1e-4)
    assert values(report, "float32")[-1] < 1e-3, "float32 has 6e-8 of W, and the change is no less than 1e-3 of it"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# --- cases at the edge -----------------------------------------------------------------------------------------------


def test_an_adapter_that_changes_nothing_loses_nothing() -> None:
    model = nn.Sequential(NF4Linear.from_linear(gaussian_linear()))
    add_adapter(model, LoRAConfig(target_modules=["0"]))
    report = merge_report(model)
    assert all((row.rms, row.kept, row.cosine, row.relative_error) == (0, 1, 1, 0) for row in report.rows)
    assert not report.warnings


def test_a_change_below_the_last_bit_is_lost() -> None:
    model = adapted_model(gaussian_linear().bfloat16(), rms=1e-9)
    assert values(merge_report(model, ["bfloat16"]), "bfloat16") == (0, 0, pytest.approx(1, rel=1e-12))


def test_overflow_is_told_and_is_valid_json() -> None:
    model = adapted_model(gaussian_linear(std=1e4), rms=1e5)
    report = merge_report(model)
    (row,) = report.of("float16")
    assert (row.kept, row.cosine, row.relative_error, row.is_erased) == (0, 0, math.inf, True)
    assert "float16 cannot hold 1 merged layers, 0 for one" in report.warnings
    plain = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert plain == json.loads(json.dumps(report.as_dict()))
    assert [r["relative_error"] for r in plain["rows"] if r["format"] == "float16"] == [None]


def test_an_embedding_has_no_row_in_4_bits() -> None:
    model = nn.Sequential(nn.Embedding(30, 16))
    add_adapter(model, LoRAConfig(target_modules=["0"]))
    nn.init.normal_(model[0].adapters["default"].lora_A)
    assert merge_report(model).formats == ["float32", "bfloat16", "float16"]


def test_what_cannot_be_reported_is_refused() -> None:
    model = adapted_model(gaussian_linear())
    with pytest.raises(InputError, match="'int8' is not one of float64, float32, bfloat16, float16, nf4"):
        merge_report(model, ["int8"])
    merge(model)
    with pytest.raises(InputError, match="call unmerge"):
        merge_report(model)
    with pytest.raises(InputError, match="no active adapter that changes a weight"):
        merge_report(nn.Sequential(nn.Linear(2, 2)))


# --- what it prints --------------------------------------------------------------------------------------------------


def report_of_three_layers() -> MergeReport:
    model = nn.Sequential()
    for i, rms in enumerate((2e-3, 1e-4, 1e-3)):
        part = adapted_model(NF4Linear.from_linear(gaussian_linear(256, 256)), rms, seed=i)
        model.append(part[0])
    return merge_report(model)


def printed(report: MergeReport, **options: Any) -> str:
    stream = io.StringIO()
    report.show(limit=2, console=Console(file=stream, width=80, **options))
    return stream.getvalue()


def test_tables_fit_80_columns_are_plain_in_a_file_and_show_the_worst_first() -> None:
    report = report_of_three_layers()
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b[" not in text
    assert "\x1b[" in printed(report, force_terminal=True, color_system="standard")
    layers = [line.split("│")[1].strip() for line in text.split("layer by layer")[1].splitlines() if "│" in line]
    assert layers == ["1", "2"], "the worst of nf4, the format that keeps least; the third is beyond the limit"
    assert "and 1 more" in text
    assert "nf4 would erase the adapters in 2 of 3 layers" in " ".join(text.split())
    assert [row.layer for row in report.of("nf4")] == ["1", "2", "0"]


def test_as_text_it_is_a_line_for_each_format_and_the_warnings() -> None:
    lines = str(report_of_three_layers()).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["float32", "bfloat16", "float16", "nf4", "warning"]
    assert " in 1)" in lines[3]
    assert "merge_to_nf4" in lines[4]
