"""The kernels as operators: torch.library's own checks, finite differences, and a compiled graph."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from helpers.kernels import DEVICE, packed, runs_somewhere, weight
from minilora.kernels import backward, dequantize, gemv, matmul, ops, quantize

pytestmark = runs_somewhere


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
def test_opcheck(double_quant: bool) -> None:
    arguments = ops.packed(packed(9, 64, double_quant))
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    g = torch.randn(3, 9, device=DEVICE, requires_grad=True)
    torch.library.opcheck(ops.nf4_dequantize, (*arguments, torch.float16))
    torch.library.opcheck(ops.nf4_matmul, (x, *arguments, None, None, None))
    torch.library.opcheck(ops.nf4_matmul, (x, *arguments, g, None, None))
    xA, B = (torch.randn(n, 2, device=DEVICE, requires_grad=True) for n in (3, 9))
    torch.library.opcheck(ops.nf4_matmul, (x, *arguments, g[0].detach().requires_grad_(), xA, B))
    torch.library.opcheck(ops.nf4_backward, (g, *arguments))
    torch.library.opcheck(ops.nf4_quantize, (x.detach().view(-1), 64))


@pytest.mark.parametrize("add", [(3, 9), (9,)], ids=["a row each", "a bias"])
def test_gradients_of_both_orders_are_those_of_the_dense_product(add: tuple[int, ...]) -> None:
    q = packed(9, 64)
    W = weight(q, torch.float32)

    def gradients(product: object) -> list[torch.Tensor]:
        torch.manual_seed(0)
        shapes = [(3, 64), add, (3, 2), (9, 2)]
        inputs = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]  # x, add, xA, B
        y = product(*inputs)  # type: ignore[operator]
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return [y, *first, *torch.autograd.grad(first[0].square().sum(), inputs)]

    ours = gradients(lambda x, add, xA, B: ops.nf4_matmul(x, *ops.packed(q), add, xA, B))
    dense = gradients(lambda x, add, xA, B: add + xA @ B.T + x @ W.T)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32 sums of 64 products, four deep


def test_a_compiled_function_holds_the_operator_without_a_graph_break() -> None:
    arguments = ops.packed(packed(9, 64))
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return ops.nf4_matmul(x.relu(), *arguments, None, None, None).tanh()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    expected, got = (torch.autograd.grad(f(x).sum(), x)[0] for f in (layer, compiled))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_single_row_has_its_own_kernel_and_the_same_result(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q = packed(9, 64)
    x, add = torch.randn(rows, 64, device=DEVICE), torch.randn(rows, 9, device=DEVICE)
    expected = add + x @ weight(q, torch.float32).T
    other = (ops.matmul, "matmul") if rows == 1 else (ops.gemv, "gemv")
    monkeypatch.setattr(*other, lambda *_: pytest.fail(f"{rows} rows went to {other[1]}"))
    got = ops.nf4_matmul(x, *ops.packed(q), add, None, None)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # float32 sums of 64 products in another order


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device; a model that is divided among GPUs has tensors on others."""
    current: list[torch.device] = []
    launched: list[torch.device] = []

    class DeviceOf:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.device = tensor.device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *error: Any) -> None:
            current.pop()

    def launch(*args: Any, **options: Any) -> None:
        launched.extend(current)

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    for module in (backward, dequantize, gemv, matmul, quantize):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, f"{name}_kernel", defaultdict(lambda: launch))  # any grid
    q, x = packed(9, 64), torch.randn(3, 64, device=DEVICE)
    gemv.gemv(x[0], q)
    matmul.matmul(x, q)
    backward.backward(x[:, :9], q)
    dequantize.dequantize(q)
    quantize.quantize(x.view(-1), 64)
    assert launched == 5 * [q.codes.device]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_may_be_on_another_device_than_the_current_one() -> None:
    q = packed(9, 64)
    W = weight(q, torch.float32)
    x, there = torch.randn(3, 64, device=DEVICE), torch.device("cuda", 1)
    arguments = [a.to(there) if isinstance(a, torch.Tensor) else a for a in ops.packed(q)]
    assert torch.cuda.current_device() == 0
    for rows in (x, x[:1]):
        y = ops.nf4_matmul(rows.to(there), *arguments, None, None, None)
        torch.testing.assert_close(y.to(DEVICE), rows @ W.T, rtol=1e-5, atol=1e-5)  # float32 sums of 64 products
    assert torch.equal(ops.nf4_dequantize(*arguments, torch.float32).to(DEVICE), W)
