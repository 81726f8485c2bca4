"""Which product is made by what: the environment, the table of measured GPUs, and what the kernels cannot do."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from minilora import kernel_dispatch, linear4bit, nf4
from minilora.adapters import add_adapter
from minilora.kernel_dispatch import ALWAYS, NEVER, Crossovers, crossovers, fused_product, read_crossovers
from minilora.linear4bit import NF4Linear, product_with_low_rank
from minilora.lora import LoRAConfig
from minilora.shared_input import project

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MINILORA_KERNELS", raising=False)
    read_crossovers.cache_clear()
    yield
    read_crossovers.cache_clear()


@pytest.fixture
def kernels_on(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", "3.6")
    if not torch.cuda.is_available():
        from minilora.kernels.codes import INTERPRETED

        assert INTERPRETED, "the tests' conftest.py sets TRITON_INTERPRET"
    monkeypatch.setenv("MINILORA_KERNELS", "on")


def test_a_cpu_uses_no_kernel_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert crossovers(CPU) == NEVER
    assert fused_product(torch.randn(1, 64), nf4.quantize(torch.randn(4, 64)), False, None) is None
    pytest.importorskip("triton", "3.6")
    read_crossovers.cache_clear()
    monkeypatch.setenv("MINILORA_KERNELS", "on")
    assert crossovers(CPU) == ALWAYS
    read_crossovers.cache_clear()
    monkeypatch.setattr(kernel_dispatch.metadata, "version", lambda name: "3.5.1")
    assert crossovers(CPU) == NEVER, "Triton is too old"


def test_a_gpu_uses_what_was_measured_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton", "3.6")
    table = tmp_path / "crossovers.json"
    table.write_text(json.dumps({"Fast GPU": {"forward": 64, "backward": 16, "dequantize": True, "date": "today"}}))
    monkeypatch.setattr(kernel_dispatch, "measured_file", lambda: table)
    for name, expected in {"Fast GPU": Crossovers(64, 16, True), "Unknown GPU": NEVER}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        read_crossovers.cache_clear()
        assert crossovers(torch.device("cuda")) == expected
    read_crossovers.cache_clear()
    monkeypatch.setenv("MINILORA_KERNELS", "off")
    assert crossovers(torch.device("cuda")) == NEVER


def test_the_committed_table_is_read() -> None:
    for measured in json.loads(kernel_dispatch.measured_file().read_text(encoding="utf-8")).values():
        assert {"forward", "backward", "dequantize", "date", "versions"} <= measured.keys()


def test_rows_above_the_crossover_go_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", "3.6")
    monkeypatch.setattr(kernel_dispatch, "crossovers", lambda device: Crossovers(forward=4, backward=2))
    q = nf4.quantize(torch.randn(8, 64))
    assert fused_product(torch.randn(4, 64), q, False, None) is not None
    assert fused_product(torch.randn(5, 64), q, False, None) is None
    assert fused_product(torch.randn(2, 8), q, True, None) is not None
    assert fused_product(torch.randn(3, 8), q, True, None) is None


@pytest.mark.parametrize(
    ("shape", "block_size", "dtype"),
    [((8, 96), 64, torch.float32), ((8, 64), 32, torch.float32), ((8, 64), 64, torch.float64)],
    ids=["blocks straddle rows", "small blocks", "float64"],
)
def test_what_no_fused_kernel_can_do_goes_to_pytorch(
    kernels_on: None, shape: tuple[int, int], block_size: int, dtype: torch.dtype
) -> None:
    q = nf4.quantize(torch.randn(shape), block_size)
    assert fused_product(torch.randn(2, shape[1], dtype=dtype), q, False, None) is None
    layer = NF4Linear.from_quantized(q)
    x = torch.randn(2, shape[1], dtype=dtype)
    W = nf4.dequantize(q, dtype)
    torch.testing.assert_close(layer(x), x @ W.T, rtol=1e-5, atol=1e-5)  # float32 sums of at most 96 products


def test_what_the_kernel_dequantizes_takes_no_second_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", "3.6")
    monkeypatch.setattr(kernel_dispatch, "crossovers", lambda device: Crossovers(dequantize=True))
    layer, x = NF4Linear.from_linear(nn.Linear(64, 48)), torch.randn(3, 64)
    y = x @ layer.dequantize().T + layer.bias
    monkeypatch.setattr(nf4, "workspace", lambda role, *size: pytest.fail(f"a buffer for the {role}"))
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)  # float32 sums of 64 products


@pytest.mark.parametrize("known", [NEVER, ALWAYS])
def test_a_batch_without_rows_needs_no_kernel(known: Crossovers, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert of a Mixture-of-Experts that no token chose is given one."""
    monkeypatch.setattr(kernel_dispatch, "crossovers", lambda device: known)
    assert fused_product(torch.empty(0, 64), nf4.quantize(torch.randn(8, 64)), False, None) is None
    assert fused_product(torch.empty(0, 8), nf4.quantize(torch.randn(8, 64)), True, None) is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_add", [True, False])
def test_nf4linear_gives_the_same_by_kernels_and_by_pytorch(
    kernels_on: None, bias: bool, with_add: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = NF4Linear.from_linear(nn.Linear(128, 70, bias=bias))
    x = torch.randn(2, 3, 128, requires_grad=True)
    add = torch.randn(2, 3, 70, requires_grad=True) if with_add else None
    inputs = [x] if add is None else [x, add]

    def results() -> list[torch.Tensor]:
        y = layer(x, add)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    by_kernels = results()
    monkeypatch.setattr(kernel_dispatch, "crossovers", lambda device: NEVER)
    for ours, expected in zip(by_kernels, results(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_a_compiled_layer_holds_the_kernels_without_a_graph_break(kernels_on: None) -> None:
    layer = NF4Linear.from_linear(nn.Linear(64, 48))
    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 48) @ layer.dequantize(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_low_rank_term_is_added_by_the_kernel(kernels_on: None, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v of a model with LoRA: one launch each, once x A^T is there."""
    torch.manual_seed(0)
    q = nf4.quantize(torch.randn(70, 128))
    x, bias, xA, B = torch.randn(rows, 128), torch.randn(70), torch.randn(rows, 4), torch.randn(70, 4)
    y = product_with_low_rank(x, q, bias, xA, B)
    monkeypatch.setattr(kernel_dispatch, "crossovers", lambda device: NEVER)
    # float32 sums of 132 products in another order
    torch.testing.assert_close(y, product_with_low_rank(x, q, bias, xA, B), rtol=1e-5, atol=1e-4)


def test_layers_with_lora_that_share_an_input_come_to_it(kernels_on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.ModuleList([NF4Linear.from_linear(nn.Linear(64, n, bias=False)) for n in (32, 48)])
    add_adapter(layers, LoRAConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))
    x = torch.randn(2, 64)
    expected = [layer(x) for layer in layers]
    low_rank = []
    monkeypatch.setattr(
        linear4bit,
        "fused_product",
        lambda rows, q, transpose, add, xA=None, B=None: (
            low_rank.append(xA is not None) or fused_product(rows, q, transpose, add, xA, B)
        ),
    )
    for y, other in zip(project(x, *layers), expected, strict=True):
        torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-5)  # float32 sums of 68 products
    assert low_rank == [True, True]
