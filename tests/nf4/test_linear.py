"""minilora/nf4/linear.py against a float64 oracle and bitsandbytes' Linear4bit."""

import copy
from dataclasses import fields

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora import nf4
from minilora.errors import InputError
from minilora.nf4 import codec
from minilora.nf4.linear import NF4Linear

SHAPES = [(64, 16), (70, 33), (3, 5)]  # (in, out): whole blocks to a row, blocks across rows, a single short block


def make(in_features: int, out_features: int, bias: bool = True, **options) -> NF4Linear:
    torch.manual_seed(0)
    return NF4Linear.from_linear(nn.Linear(in_features, out_features, bias=bias), **options)


def oracle(layer: NF4Linear, x: Tensor, add: Tensor | None) -> Tensor:
    y = F.linear(x.double(), layer.dequantize(torch.float32).double())
    for term in (layer.bias, add):
        y = y if term is None else y + term.double()
    return y


# -------------------------------------------------------------------------------------- the product and its gradient


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_add", [False, True])
def test_float64_gradcheck(shape, bias, with_add):
    layer = make(*shape, bias=bias)
    x = torch.randn(2, 3, shape[0], dtype=torch.float64, requires_grad=True)
    add = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True) if with_add else None
    inputs = (x,) if add is None else (x, add)
    # 1e-14: float64 rounding of a sum of at most 70 terms
    torch.testing.assert_close(layer(*inputs), oracle(layer, x, add), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_gradients_against_float64(shape, dtype):
    layer = make(*shape).to(dtype)
    x, add = (torch.randn(4, 7, n).to(dtype).requires_grad_() for n in shape)
    grad_y = torch.randn(4, 7, shape[1]).to(dtype)
    y = layer(x, add)
    y.backward(grad_y)
    assert y.dtype == x.grad.dtype == dtype

    x64, add64 = (t.detach().double().requires_grad_() for t in (x, add))
    y64 = oracle(layer, x64, add64)
    y64.backward(grad_y.double())
    # relative to the size of the result: W rounded to dtype, and the sum rounded once, are half an ulp (eps / 2) each;
    # bias + add is one rounding more. 4 leaves room for all of them meeting in the largest element.
    tolerance = 4 * torch.finfo(dtype).eps
    for actual, expected in ((y, y64), (x.grad, x64.grad)):
        assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert torch.equal(add.grad, grad_y)


def test_add_is_accumulated_before_the_rounding():
    layer, x = make(576, 192, bias=False), torch.randn(256, 576).bfloat16()
    add = (torch.randn(256, 192) / 2).bfloat16()  # about as large as the product
    exact = F.linear(x.double(), layer.dequantize(torch.bfloat16).double()) + add.double()
    fused, apart = layer(x, add), layer(x) + add
    rms = lambda y: (y.double() - exact).square().mean().sqrt()  # noqa: E731
    best = rms(exact.bfloat16())
    # one rounding: only float32 accumulation (576 terms) is added to the best that bfloat16 can do
    assert rms(fused) <= 1.001 * best
    assert rms(apart) > 1.01 * best  # two roundings can be told apart from one on this data


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_equals_bitsandbytes_linear4bit(compute_dtype, double_quant):
    linear = nn.Linear(192, 64)
    layer = NF4Linear.from_linear(linear, compute_dtype=compute_dtype, double_quant=double_quant)
    reference = bitsandbytes.nn.Linear4bit(192, 64, compute_dtype=compute_dtype, quant_type="nf4")
    reference.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double_quant
    )
    reference.bias = linear.bias
    reference.to("cpu").train()
    x = torch.randn(5, 192).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    (expected_grad,) = torch.autograd.grad(reference(x).sum(), x)
    # the weights are equal to the bit, so what is left is the order of sums and where the bias is rounded in
    tolerance = 2 * torch.finfo(compute_dtype).eps
    torch.testing.assert_close(layer(x), reference(x), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance)


def test_compute_dtype_leaves_the_inputs_dtype():
    layer = make(64, 32, compute_dtype=torch.bfloat16)
    x = torch.randn(2, 64, requires_grad=True)
    y = layer(x, torch.randn(2, 32))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32
    assert layer.dequantize().dtype == torch.bfloat16


def test_a_graph_holds_no_dequantized_weight():
    layer = make(128, 64, bias=False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(torch.randn(2, 128, requires_grad=True))
    assert not saved
    q = y.grad_fn.q
    kept = [v for v in vars(y.grad_fn).values() if isinstance(v, Tensor)]
    kept += [v for f in fields(q) if isinstance(v := getattr(q, f.name), Tensor)]
    own = {buffer.data_ptr() for buffer in layer.buffers()}
    assert kept
    assert all(t.data_ptr() in own for t in kept)


@pytest.mark.parametrize("double_quant", [False, True])
def test_compiles_forward_and_backward_in_one_graph(double_quant):
    layer = make(70, 33, double_quant=double_quant)
    x = torch.randn(5, 70, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    wanted, y = layer(x), compiled(x)
    assert torch.equal(y, wanted)
    (gradient,), (wanted_gradient,) = (torch.autograd.grad(out.pow(2).sum(), x) for out in (y, wanted))
    assert torch.equal(gradient, wanted_gradient)
    q = layer.quantized()
    arguments = q.codes, q.absmax, q.nested_absmax, q.offset, 70 * 33, q.block_size, q.nested_block_size, torch.bfloat16
    torch.library.opcheck(codec._dequantize_in_a_graph, arguments)


def test_layers_in_one_graph_do_not_disturb_each_other():
    # all their dequantized weights pass through the same scratch memory, also while a checkpoint recomputes
    layers = nn.Sequential(*(make(64, 64) for _ in range(3)))
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(layers(x).square().sum(), x)[0]
    recomputed = torch.autograd.grad(checkpoint(layers, x, use_reentrant=False).square().sum(), x)[0]
    W, b = [m.dequantize(torch.float32).double() for m in layers], [m.bias.double() for m in layers]
    y = x
    for i in range(3):
        y = F.linear(y, W[i], b[i])
    expected = torch.autograd.grad(y.square().sum(), x)[0]
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-12)  # float64 rounding
    assert torch.equal(recomputed, plain)


def test_only_inputs_get_a_gradient():
    layer = make(64, 32)
    for made in (layer, NF4Linear(64, 32, bias=True)):
        assert [p.requires_grad for p in made.parameters()] == [False]  # the bias
    add = torch.randn(3, 32, requires_grad=True)
    layer(torch.randn(3, 64), add).sum().backward()
    assert torch.equal(add.grad, torch.ones(3, 32))


# ---------------------------------------------------------------------------------------- an ordinary module


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_safetensors_round_trip(tmp_path, double_quant, bias):
    layer, x = make(70, 33, bias=bias, double_quant=double_quant), torch.randn(2, 70)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    copied = NF4Linear(70, 33, bias=bias, double_quant=double_quant)
    copied.load_state_dict(state)
    assigned = NF4Linear(70, 33, bias=bias, double_quant=double_quant, device="meta")
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(copied(x), layer(x))
    assert torch.equal(assigned(x), layer(x))


def test_single_and_double_quantization_do_not_load_into_each_other():
    single, double = (make(64, 32, double_quant=flag).state_dict() for flag in (False, True))
    with pytest.raises(RuntimeError, match="nested_absmax"):
        NF4Linear(64, 32, bias=True, double_quant=True).load_state_dict(single)
    with pytest.raises(RuntimeError, match="nested_absmax"):
        NF4Linear(64, 32, bias=True, double_quant=False).load_state_dict(double)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: nn.Sequential(m).to("cpu", torch.float16)[0],
        copy.deepcopy,
    ],
)
def test_conversions_leave_the_weight_as_it_was_quantized(convert, double_quant):
    layer = make(70, 33, double_quant=double_quant)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    after = convert(layer)
    assert [(name, b.dtype) for name, b in after.named_buffers()] == [(name, b.dtype) for name, b in before.items()]
    assert all(torch.equal(buffer, before[name]) for name, buffer in after.named_buffers())


def test_dtype_goes_to_the_bias_and_device_to_everything():
    layer = make(64, 32).to("meta", torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.nested_absmax.dtype == torch.float32
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}


def test_deepcopy_shares_nothing():
    layer = make(64, 32)
    other = copy.deepcopy(layer)
    other.weight.zero_()
    assert layer.weight.any()


def test_from_quantized_keeps_the_tensors_and_gives_them_back():
    q = nf4.quantize(torch.randn(33, 70))
    layer = NF4Linear.from_quantized(q, compute_dtype=torch.bfloat16)
    back = layer.quantized()
    assert (layer.in_features, layer.out_features) == (70, 33)
    assert back.codes is q.codes
    assert back.absmax is q.absmax
    assert torch.equal(layer.dequantize(torch.float32), nf4.dequantize(q))


# ------------------------------------------------------------------------------------------------ bad input


def test_a_weight_with_nan_is_refused_by_name():
    linear = nn.Linear(64, 32)
    linear.weight.data[3, 5] = float("nan")
    with pytest.raises(InputError, match=r"model\.q_proj.*element 197 .*nan"):
        NF4Linear.from_linear(linear, name="model.q_proj")


def test_only_a_matrix_makes_a_layer():
    with pytest.raises(InputError, match="matrix"):
        NF4Linear.from_quantized(nf4.quantize(torch.randn(2, 3, 64)))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_only_a_floating_point_dtype_computes(dtype):
    with pytest.raises(InputError, match=r"compute_dtype .* is not a floating-point dtype"):
        NF4Linear(64, 32, compute_dtype=dtype)


def test_whole_numbers_are_refused_as_nn_linear_refuses_them():
    with pytest.raises(InputError, match=r"x is torch\.int64"):
        NF4Linear.from_linear(nn.Linear(64, 32))(torch.ones(2, 64, dtype=torch.int64))
