"""Which product is made by what: the environment, the table of measured GPUs, and what the kernels cannot do."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from minilora import kernel_dispatch, linear4bit, nf4
from minilora.adapters import add_adapter
from minilora.errors import InputError
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
def device() -> torch.device:
    """Where kernels run: a GPU, or in Triton's interpreter the CPU. Skips without a Triton that can."""
    found: torch.device = importlib.import_module("kernel_helpers").DEVICE
    return found


@pytest.fixture
def kernels_on(fresh: None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setenv("MINILORA_KERNELS", "on")
    return device


def test_a_cpu_uses_no_kernel_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert crossovers(CPU) == NEVER
    assert fused_product(torch.randn(1, 64), nf4.quantize(torch.randn(4, 64)), False, None) is None
    pytest.importorskip("triton", "3.6")
    from minilora.kernels import codes

    monkeypatch.setenv("MINILORA_KERNELS", "on")
    for interpreted in (True, False):
        monkeypatch.setattr(codes, "INTERPRETED", interpreted)
        read_crossovers.cache_clear()
        assert crossovers(CPU) == (ALWAYS if interpreted else NEVER), "a compiled kernel cannot read its memory"
    read_crossovers.cache_clear()
    assert crossovers(torch.device("cuda")) == ALWAYS
    read_crossovers.cache_clear()
    monkeypatch.setattr(kernel_dispatch.metadata, "version", lambda name: "3.5.1")
    assert crossovers(torch.device("cuda")) == NEVER, "Triton is too old"


def test_a_gpu_uses_what_was_measured_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton", "3.6")
    table = tmp_path / "crossovers.json"
    fast = {"forward": 64, "backward": 16, "dequantize": True, "quantize": True, "date": "today"}
    table.write_text(json.dumps({"Fast GPU": fast}))
    monkeypatch.setattr(kernel_dispatch, "measured_file", lambda: table)
    for name, expected in {"Fast GPU": Crossovers(64, 16, True, True), "Unknown GPU": NEVER}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        read_crossovers.cache_clear()
        assert crossovers(torch.device("cuda")) == expected
    read_crossovers.cache_clear()
    monkeypatch.setenv("MINILORA_KERNELS", "off")
    assert crossovers(torch.device("cuda")) == NEVER


def test_without_an_installation_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """minilora.kernels lies elsewhere in the sources: only an installation puts it there."""
    pytest.importorskip("triton", "3.6")
    monkeypatch.setattr(kernel_dispatch, "find_spec", lambda name: None)
    for wish in ("", "on"):
        monkeypatch.setenv("MINILORA_KERNELS", wish)
        read_crossovers.cache_clear()
        assert crossovers(torch.device("cuda")) == NEVER


def test_the_committed_table_is_read() -> None:
    for measured in json.loads(kernel_dispatch.measured_file().read_text(encoding="utf-8")).values():
        assert {*kernel_dispatch.MEASURED, "date", "versions"} <= measured.keys()


def test_a_choice_that_there_is_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = NF4Linear(64, 4)
    monkeypatch.setenv("MINILORA_KERNELS", "yes")
    with pytest.raises(InputError, match=r"MINILORA_KERNELS is 'yes': it can be 'on' or 'off', or not be set"):
        layer(torch.randn(1, 64))
    monkeypatch.setenv("MINILORA_KERNELS", "")
    layer(torch.randn(1, 64))


def test_the_folder_kernels_does_not_hide_the_package_of_that_name(tmp_path: Path) -> None:
    """Python started in the repository's root finds PyPI's `kernels`, which comes behind it on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): return f'theirs: {name}'")
    look = "import kernels; print(kernels.get_kernel('any'))"
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", look]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "theirs: any\n", done.stderr


def test_rows_above_the_crossover_go_to_pytorch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_dispatch, "crossovers", lambda device: Crossovers(forward=4, backward=2))
    q = nf4.quantize(torch.randn(8, 64, device=device))

    def is_fused(M: int, N: int, transpose: bool, dtype: torch.dtype = torch.float16) -> bool:
        return fused_product(torch.randn(M, N, device=device, dtype=dtype), q, transpose, None) is not None

    assert is_fused(4, 64, False)
    assert not is_fused(5, 64, False)
    assert is_fused(2, 8, True)
    assert not is_fused(3, 8, True)
    assert not is_fused(1, 64, False, torch.float32)  # the limits were measured in half precision


@pytest.mark.parametrize(
    ("shape", "block_size", "dtype"),
    [((8, 96), 64, torch.float32), ((8, 64), 32, torch.float32), ((8, 64), 64, torch.float64)],
    ids=["blocks straddle rows", "small blocks", "float64"],
)
def test_what_no_fused_kernel_can_do_goes_to_pytorch(
    kernels_on: torch.device, shape: tuple[int, int], block_size: int, dtype: torch.dtype
) -> None:
    q = nf4.quantize(torch.randn(shape, device=kernels_on), block_size)
    x = torch.randn(2, shape[1], dtype=dtype, device=kernels_on)
    assert fused_product(x, q, False, None) is None
    layer = NF4Linear.from_quantized(q)
    W = nf4.dequantize(q, dtype)
    torch.testing.assert_close(layer(x), x @ W.T, rtol=1e-5, atol=1e-5)  # float32 sums of at most 96 products


def test_what_the_kernel_dequantizes_takes_no_second_buffer(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_dispatch, "crossovers", lambda device: Crossovers(dequantize=True))
    layer, x = NF4Linear.from_linear(nn.Linear(64, 48, device=device)), torch.randn(3, 64, device=device)
    y = x @ layer.dequantize().T + layer.bias
    monkeypatch.setattr(nf4, "workspace", lambda role, *size: pytest.fail(f"a buffer for the {role}"))
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)  # float32 sums of 64 products


def test_weights_are_quantized_by_the_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = importlib.import_module("minilora.kernels.ops")
    by_kernel = []
    quantize = ops.nf4_quantize
    monkeypatch.setattr(ops, "nf4_quantize", lambda w, size: by_kernel.append(w.dtype) or quantize(w, size))
    monkeypatch.setattr(kernel_dispatch, "crossovers", lambda device: Crossovers(quantize=True))
    for dtype in (torch.float32, torch.float16, torch.float64):  # the last in PyTorch
        linear = nn.Linear(100, 9, dtype=dtype, device=device)  # 14 whole blocks, and 4 weights more
        ours, expected = NF4Linear.from_linear(linear, name="q_proj"), nf4.quantize(linear.weight)
        for name in ("absmax", "nested_absmax", "offset"):
            assert torch.equal(getattr(ours, name), getattr(expected, name))
        assert torch.equal(ours.weight, expected.codes)
        linear.weight.data[3, 1] = torch.nan
        with pytest.raises(InputError, match="q_proj cannot be quantized to NF4: element 301"):
            NF4Linear.from_linear(linear, name="q_proj")
    assert by_kernel == 2 * [torch.float32] + 2 * [torch.float16]
    monkeypatch.setattr(kernel_dispatch, "crossovers", lambda device: NEVER)
    NF4Linear.from_linear(nn.Linear(64, 9, device=device))
    assert len(by_kernel) == 4


@pytest.mark.parametrize("arrive", ["made there", "moved there"])
def test_a_layer_that_has_arrived_finds_its_tables(arrive: str) -> None:
    """A first call in a CUDA graph's capture could not copy them to the GPU."""
    tables = (nf4.code, nf4.dynamic_map, nf4.byte_pairs)
    layer = NF4Linear(64, 4)
    q = layer.quantized()
    for table in tables:
        table.cache_clear()
    layer = NF4Linear.from_quantized(q) if arrive == "made there" else layer.to(CPU)
    made = [table.cache_info().misses for table in tables]
    assert all(made)
    layer(torch.randn(1, 64))
    assert [table.cache_info().misses for table in tables] == made


@pytest.mark.parametrize("used_before", [True, False])
def test_a_fake_layer_leaves_nothing_fake(used_before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a table nor a buffer; and takes none that a real one has left."""
    monkeypatch.setattr(nf4, "_workspaces", nf4._Workspaces())
    for table in (nf4.code, nf4.dynamic_map, nf4.byte_pairs):
        table.cache_clear()
    layer, x = NF4Linear.from_linear(nn.Linear(64, 4)), torch.randn(2, 64)
    if used_before:
        layer(x)
    else:
        for table in (nf4.code, nf4.dynamic_map, nf4.byte_pairs):
            table.cache_clear()
    with FakeTensorMode():
        y = NF4Linear(64, 4).to(CPU)(torch.randn(2, 64, requires_grad=True))
        y.sum().backward()
        assert isinstance(y, FakeTensor) and y.shape == (2, 4)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T + layer.bias, rtol=1e-5, atol=1e-5)  # sums of 64


@pytest.mark.parametrize("known", [NEVER, ALWAYS])
def test_a_batch_without_rows_needs_no_kernel(known: Crossovers, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert of a Mixture-of-Experts that no token chose is given one."""
    monkeypatch.setattr(kernel_dispatch, "crossovers", lambda device: known)
    assert fused_product(torch.empty(0, 64), nf4.quantize(torch.randn(8, 64)), False, None) is None
    assert fused_product(torch.empty(0, 8), nf4.quantize(torch.randn(8, 64)), True, None) is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_add", [True, False])
def test_nf4linear_gives_the_same_by_kernels_and_by_pytorch(
    kernels_on: torch.device, bias: bool, with_add: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = NF4Linear.from_linear(nn.Linear(128, 70, bias=bias, device=kernels_on))
    x = torch.randn(2, 3, 128, device=kernels_on, requires_grad=True)
    add = torch.randn(2, 3, 70, device=kernels_on, requires_grad=True) if with_add else None
    inputs = [x] if add is None else [x, add]

    def results() -> list[torch.Tensor]:
        y = layer(x, add)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    by_kernels = results()
    monkeypatch.setattr(kernel_dispatch, "crossovers", lambda device: NEVER)
    for ours, expected in zip(by_kernels, results(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_a_compiled_layer_holds_the_kernels_without_a_graph_break(kernels_on: torch.device) -> None:
    layer = NF4Linear.from_linear(nn.Linear(64, 48, device=kernels_on))
    x = torch.randn(3, 64, device=kernels_on, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    expected = torch.ones(3, 48, device=kernels_on) @ layer.dequantize()
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)  # float32 sums of 48 weights


@pytest.mark.parametrize("rows", [1, 3])
def test_a_low_rank_term_is_added_by_the_kernel(
    kernels_on: torch.device, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v of a model with LoRA: one launch each, once x A^T is there."""
    torch.manual_seed(0)
    q = nf4.quantize(torch.randn(70, 128, device=kernels_on))
    x, bias, xA, B = (torch.randn(shape, device=kernels_on) for shape in ((rows, 128), (70,), (rows, 4), (70, 4)))
    y = product_with_low_rank(x, q, bias, xA, B)
    monkeypatch.setattr(kernel_dispatch, "crossovers", lambda device: NEVER)
    # float32 sums of 132 products in another order
    torch.testing.assert_close(y, product_with_low_rank(x, q, bias, xA, B), rtol=1e-5, atol=1e-4)


def test_layers_with_lora_that_share_an_input_come_to_it(
    kernels_on: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears = [nn.Linear(64, n, bias=False, device=kernels_on) for n in (32, 48)]
    layers = nn.ModuleList([NF4Linear.from_linear(linear) for linear in linears])
    add_adapter(layers, LoRAConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))
    x = torch.randn(2, 64, device=kernels_on)
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
