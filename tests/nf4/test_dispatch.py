"""Which product is made by what: the environment, what trials have found, and what the kernels cannot do."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.trials import FakeGPU
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from minilora import nf4
from minilora.adapters.attach import add_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError
from minilora.models.shared_input import project
from minilora.nf4 import codec, dispatch, scratch
from minilora.nf4 import linear as linear4bit
from minilora.nf4.dispatch import fused_product, most_rows, temporary_weight, trials
from minilora.nf4.kernel_device import Kind
from minilora.nf4.kernel_trials import Trials
from minilora.nf4.linear import NF4Linear, product_with_low_rank

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MINILORA_KERNELS", raising=False)
    trials.cache_clear()
    yield
    trials.cache_clear()


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: a GPU, or in Triton's interpreter the CPU. Skips without a Triton that can."""
    found: torch.device = importlib.import_module("helpers.kernels").DEVICE
    return found


@pytest.fixture
def kernels_on(fresh: None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setenv("MINILORA_KERNELS", "on")
    return device


Wins = Callable[[str, int], bool]  # a kernel, and M rows of x


def chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wins: Wins) -> FakeGPU:
    """On every device the kernels that win win there: in trials, with a clock that says so."""
    gpu = FakeGPU(lambda kind, shape, M: (1e-5, 2e-5 if wins(kind.kernel, M) else 0.5e-5))
    known = Trials(gpu, tmp_path)
    monkeypatch.setattr(dispatch, "trials", lambda device: known)
    return gpu


def none_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "trials", lambda device: False)


def test_a_cpu_uses_no_kernel_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trials(CPU) is False
    assert fused_product(torch.randn(1, 64), nf4.quantize(torch.randn(4, 64)), False, None) is None
    pytest.importorskip("triton", "3.6")
    from minilora.kernels import codes

    monkeypatch.setenv("MINILORA_KERNELS", "on")
    for interpreted in (True, False):
        monkeypatch.setattr(codes, "INTERPRETED", interpreted)
        trials.cache_clear()
        assert trials(CPU) is interpreted, "a compiled kernel cannot read its memory"
    trials.cache_clear()
    assert trials(torch.device("cuda")) is True
    trials.cache_clear()
    monkeypatch.setattr(dispatch.metadata, "version", lambda name: "3.5.1")
    assert trials(torch.device("cuda")) is False, "Triton is too old"


@pytest.mark.parametrize("wish", ["", "auto"])
def test_a_gpu_uses_what_has_won_on_it(wish: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the user's cache folder; on one that is not there, as fake tensors can be, or in the interpreter, none."""
    pytest.importorskip("triton", "3.6")
    from minilora.kernels import codes

    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    monkeypatch.setenv("MINILORA_KERNELS", wish)
    monkeypatch.setattr(codes, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fast GPU")
    for there in (True, False):
        trials.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        found = trials(torch.device("cuda", 0))
        assert isinstance(found, Trials) if there else found is False
        if isinstance(found, Trials):
            assert found.verdicts.device["GPU"] == "Fast GPU" and found.verdicts.path.parent == tmp_path / "kernels"
            assert trials(torch.device("cuda", 0)) is found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(codes, "INTERPRETED", True)
    trials.cache_clear()
    assert trials(torch.device("cuda", 0)) is False
    monkeypatch.setenv("MINILORA_KERNELS", "off")
    monkeypatch.setattr(codes, "INTERPRETED", False)
    trials.cache_clear()
    assert trials(torch.device("cuda", 0)) is False


def test_a_triton_that_cannot_be_imported_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton", "3.6")
    monkeypatch.setitem(sys.modules, "minilora.kernels.codes", None)
    assert trials(torch.device("cuda")) is False
    assert "Triton cannot be imported: import of minilora.kernels.codes halted" in caplog.text
    monkeypatch.setenv("MINILORA_KERNELS", "on")
    trials.cache_clear()
    with pytest.raises(ImportError):
        trials(torch.device("cuda"))


def test_without_an_installation_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """minilora.kernels lies elsewhere in the sources: only an installation puts it there."""
    pytest.importorskip("triton", "3.6")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    for wish in ("", "on"):
        monkeypatch.setenv("MINILORA_KERNELS", wish)
        trials.cache_clear()
        assert trials(torch.device("cuda")) is False


def test_a_choice_that_there_is_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = NF4Linear(64, 4)
    monkeypatch.setenv("MINILORA_KERNELS", "yes")
    with pytest.raises(InputError, match=r"MINILORA_KERNELS is 'yes': it can be 'auto', 'on' or 'off', or not be set"):
        layer(torch.randn(1, 64))
    monkeypatch.setenv("MINILORA_KERNELS", "")
    layer(torch.randn(1, 64))


def test_the_folder_kernels_does_not_hide_the_package_of_that_name(tmp_path: Path) -> None:
    """Python started in the repository's root finds PyPI's `kernels`, which comes behind it on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): return f'theirs: {name}'")
    look = "import kernels; print(kernels.get_kernel('any'))"
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", look]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "theirs: any\n", done.stderr


def test_each_product_asks_for_its_own_kernel(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits = {"gemv": 0, "matmul": 4, "backward": 2}
    gpu = chosen(monkeypatch, tmp_path, lambda kernel, M: limits.get(kernel, 0) >= M)
    q = nf4.quantize(torch.randn(8, 64, device=device))

    def is_fused(M: int, N: int, transpose: bool) -> bool:
        rows = torch.randn(M, N, device=device, dtype=torch.float16)
        return fused_product(rows, q, transpose, None) is not None

    assert not is_fused(1, 64, False)
    assert is_fused(2, 64, False) and is_fused(4, 64, False)
    assert not is_fused(5, 64, False)
    assert is_fused(1, 8, True) and is_fused(2, 8, True)
    assert not is_fused(3, 8, True)
    assert temporary_weight(q, torch.float16).shape == (8, 64)
    assert gpu.proven == [Kind(name, torch.float16, 64, True) for name in ("dequantize", "gemv", "matmul", "backward")]
    single = nf4.quantize(torch.randn(8, 128, device=device), 128, double_quant=False)
    fused_product(torch.randn(2, 128, device=device), single, False, None)
    assert gpu.proven[-1] == Kind("matmul", torch.float32, 128, False)
    assert {shape for _, shape, _ in gpu.tried} == {(8, 64), (8, 128)}


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
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen(monkeypatch, tmp_path, lambda kernel, M: kernel == "dequantize")
    layer, x = NF4Linear.from_linear(nn.Linear(64, 48, device=device)), torch.randn(3, 64, device=device)
    y = x @ layer.dequantize().T + layer.bias
    monkeypatch.setattr(scratch, "workspace", lambda role, *size: pytest.fail(f"a buffer for the {role}"))
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)  # float32 sums of 64 products


def test_weights_are_quantized_by_the_kernel(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ops = importlib.import_module("minilora.kernels.ops")
    by_kernel = []
    quantize = ops.nf4_quantize
    monkeypatch.setattr(ops, "nf4_quantize", lambda w, size: by_kernel.append(w.dtype) or quantize(w, size))
    gpu = chosen(monkeypatch, tmp_path, lambda kernel, M: kernel == "quantize")
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
    assert gpu.proven == [Kind("quantize", dtype, 64, False) for dtype in (torch.float32, torch.float16)]
    nf4_of = dispatch.quantize_weight
    assert nf4_of(torch.randn(63, device=device)).codes.shape == (32,), "not one whole block"
    with pytest.raises(InputError, match="block_size 48 is not one of"):
        nf4_of(torch.randn(96, device=device), 48)
    none_wins(monkeypatch)
    NF4Linear.from_linear(nn.Linear(64, 9, device=device))
    assert len(by_kernel) == 4 and len(gpu.tried) == 2


@pytest.mark.parametrize("arrive", ["made there", "moved there"])
def test_a_layer_that_has_arrived_finds_its_tables(arrive: str) -> None:
    """A first call in a CUDA graph's capture could not copy them to the GPU."""
    tables = (nf4.code, nf4.dynamic_map, codec.byte_pairs)
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
    monkeypatch.setattr(scratch, "_workspaces", scratch._Workspaces())
    for table in (nf4.code, nf4.dynamic_map, codec.byte_pairs):
        table.cache_clear()
    layer, x = NF4Linear.from_linear(nn.Linear(64, 4)), torch.randn(2, 64)
    if used_before:
        layer(x)
    else:
        for table in (nf4.code, nf4.dynamic_map, codec.byte_pairs):
            table.cache_clear()
    with FakeTensorMode():
        y = NF4Linear(64, 4).to(CPU)(torch.randn(2, 64, requires_grad=True))
        y.sum().backward()
        assert isinstance(y, FakeTensor) and y.shape == (2, 4)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T + layer.bias, rtol=1e-5, atol=1e-5)  # sums of 64


@pytest.mark.parametrize("known", [False, True, "trials"])
def test_a_batch_without_rows_needs_no_kernel(
    known: bool | str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An expert of a Mixture-of-Experts that no token chose is given one."""
    chosen(monkeypatch, tmp_path, lambda kernel, M: True)
    if isinstance(known, bool):
        monkeypatch.setattr(dispatch, "trials", lambda device: known)
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
    none_wins(monkeypatch)
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
    none_wins(monkeypatch)
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


# --- traced and recorded ----------------------------------------------------------------------------------------------


def graph_of(layer: nn.Module) -> tuple[nn.Module, CompileCounterWithBackend]:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    return torch.compile(layer, backend=graphs, fullgraph=True, dynamic=True), graphs


def test_a_compiled_graph_holds_what_is_known_and_tries_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One graph for all the rows that the kernel wins with, and one for more."""
    gpu = chosen(monkeypatch, tmp_path, lambda kernel, M: M <= 8)
    layer = NF4Linear.from_linear(nn.Linear(64, 48, device=device, dtype=torch.float16)).requires_grad_(False)
    gpu.tried.clear()
    calls: list[int] = []
    ops = importlib.import_module("minilora.kernels.ops")
    real = ops.matmul.matmul
    monkeypatch.setattr(ops.matmul, "matmul", lambda x, *more: calls.append(len(x)) or real(x, *more))

    def x(M: int) -> torch.Tensor:
        return torch.randn(M, 64, device=device, dtype=torch.float16)

    def check(compiled: nn.Module, M: int) -> None:
        rows = x(M)
        exact = rows.float() @ layer.dequantize(torch.float32).T + layer.bias.float()
        torch.testing.assert_close(compiled(rows).float(), exact, rtol=2e-3, atol=2e-3)  # float16

    compiled, graphs = graph_of(layer)
    for M in (3, 5, 7, 30):
        check(compiled, M)
    assert calls == [] and gpu.tried == [] and graphs.frame_count == 1, "nothing is known: PyTorch's way"

    layer(x(8))  # now it is tried, without a graph
    calls.clear()
    tried = list(gpu.tried)
    assert [M for kind, _, M in tried if kind.kernel == "matmul"] == [8]
    compiled, graphs = graph_of(layer)
    for M in (3, 5, 8, 9, 30, 4):
        check(compiled, M)
    assert calls == [3, 5, 8, 4] and graphs.frame_count == 2
    assert gpu.tried == tried, "nothing is tried in a graph"


def test_fake_tensors_try_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They can be on a GPU that is not there."""
    kind = Kind("matmul", torch.float16, 64, True)
    with FakeTensorMode():
        codes = torch.empty(32, dtype=torch.uint8, device="cuda")
    assert torch.cuda.is_available() or dispatch.uses_kernel(codes, kind, (1, 64)) is False
    gpu = chosen(monkeypatch, tmp_path, lambda kernel, M: True)
    assert dispatch.uses_kernel(codes, kind, (1, 64)) is False and gpu.proven == []
    assert dispatch.uses_kernel(torch.empty(32), kind, (1, 64)), "tried now"
    assert dispatch.uses_kernel(codes, kind, (1, 64)), "and known"
    with FakeTensorMode():
        assert NF4Linear(64, 4)(torch.randn(2, 64)).shape == (2, 4)
    assert gpu.proven == [kind._replace(kernel="dequantize"), kind]


def test_a_limit_is_that_of_the_grid_at_most(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kind, shape = Kind("matmul", torch.float16, 64, True), (8, 64)
    gpu = chosen(monkeypatch, tmp_path, lambda kernel, M: True)
    assert most_rows(CPU, *kind, shape) == 0
    dispatch.uses_kernel(torch.empty(1), kind, shape, 10**5)
    assert most_rows(CPU, *kind, shape) == dispatch.MOST_ROWS
    assert not dispatch.uses_kernel(torch.empty(1), kind, shape, dispatch.MOST_ROWS + 1)
    assert len(gpu.tried) == 2
    for known, limit in ((True, dispatch.MOST_ROWS), (False, 0)):
        monkeypatch.setattr(dispatch, "trials", lambda device, known=known: known)
        assert most_rows(CPU, *kind, shape) == limit
