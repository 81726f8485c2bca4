"""What a trial does on its device: here with the real kernels, on a GPU or in Triton's interpreter."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from minilora import nf4
from minilora.nf4 import codec, kernel_device
from minilora.nf4.kernel_device import GPU, Kind, random_weight
from minilora.nf4.kernel_trials import Trials
from minilora.nf4.linear import NF4Linear

KERNELS = ("quantize", "dequantize", "gemv", "matmul", "backward")
SHAPE = (70, 128)


class Interpreter(GPU):
    """The CPU as a GPU, where there is none; `fast`: the kernels, or else PyTorch."""

    fast = True

    def identity(self) -> dict[str, str]:
        return {"GPU": "interpreter"}

    def is_recording(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    def seconds(self, call: Any) -> float:
        call()
        is_kernel = "minilora::" in str(getattr(call, "func", ""))  # CustomOpDef(minilora::nf4_…)
        return 1e-6 if is_kernel == self.fast else 2e-6


@pytest.fixture
def device() -> torch.device:
    """Where kernels run. Skips without a Triton that can."""
    found: torch.device = importlib.import_module("helpers.kernels").DEVICE
    return found


@pytest.fixture
def gpu(device: torch.device) -> GPU:
    return Interpreter(device)


def kind(kernel: str, dtype: torch.dtype = torch.float16, double_quant: bool = True) -> Kind:
    return Kind(kernel, dtype, 64, double_quant)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_both_ways_lead_to_one_result(gpu: GPU, kernel: str, double_quant: bool, dtype: torch.dtype) -> None:
    M = 1 if kernel == "gemv" else 5
    for by_kernel in (True, False):
        contest = gpu.contest(kind(kernel, dtype, double_quant), SHAPE, M, by_kernel)
        ours, theirs = contest.kernel(), contest.pytorch()
        assert contest.fault(ours, theirs) == ""
        for a, b in zip(ours, theirs, strict=True):
            # float32: sums in another order. float16: its rounding, and for gemv that of W, of values up to 40
            tolerance = 0.04 if dtype == torch.float16 and "quantize" not in kernel else 1e-5
            torch.testing.assert_close(a, b, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("place", [0, -1])
def test_a_result_that_is_wrong_in_one_place_is_noticed(gpu: GPU, kernel: str, place: int) -> None:
    """Also where all rows are not compared at once."""
    contest = gpu.contest(kind(kernel), SHAPE, 1 if kernel == "gemv" else 1000, True)
    results = [contest.kernel(), contest.pytorch()]
    part = results[0][1] if kernel == "quantize" else results[0]
    part[(-1 if place else 0) if part.dim() == 1 else (place, place)] += 1 + part.abs().max()
    assert contest.fault(*results) != ""


@pytest.mark.parametrize("kernel", ["matmul", "backward"])
def test_tf32_is_no_fault_and_a_block_left_out_is_one(gpu: GPU, kernel: str) -> None:
    """PyTorch's way may be rough, where the caller has allowed it; of the longest rows a block is the smallest part."""
    contest = gpu.contest(kind(kernel, torch.float32), (16, 4096) if kernel == "matmul" else (4096, 64), 16, True)
    call = contest.kernel
    x = call.args[0]  # type: ignore[attr-defined]
    theirs = contest.pytorch()
    tf32 = call.func(((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32), *call.args[1:])  # type: ignore[attr-defined]
    assert not torch.allclose(tf32, theirs, rtol=0, atol=1e-4) and contest.fault(tf32, theirs) == ""
    x[:, 64:128] = 0
    assert contest.fault(call(), theirs) != ""


def test_the_ways_are_called_with_the_shapes_that_are_asked_for(gpu: GPU) -> None:
    assert gpu.contest(kind("matmul"), SHAPE, 5, True).kernel().shape == (5, 70)
    assert gpu.contest(kind("backward"), SHAPE, 5, True).kernel().shape == (5, 128)
    assert gpu.contest(kind("dequantize"), SHAPE, 1, True).kernel().shape == SHAPE
    assert gpu.contest(kind("quantize"), SHAPE, 1, True).kernel()[0].shape == (70 * 128 // 2,)


@pytest.mark.parametrize("shape", [(64, 64), (7, 37)], ids=["whole blocks", "an odd number"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_random_weight_is_a_weight(shape: tuple[int, int], double_quant: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    q = random_weight(kind("matmul", double_quant=double_quant), shape, draw)
    real = nf4.quantize(torch.randn(shape, dtype=torch.float16), double_quant=double_quant)
    for part in ("codes", "absmax", "nested_absmax", "offset"):
        ours, theirs = getattr(q, part), getattr(real, part)
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert 0.1 < nf4.dequantize(q).float().std() < 10


def test_a_trial_leaves_the_callers_random_numbers_alone(gpu: GPU, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.randn(3, device=gpu.device)
    torch.manual_seed(0)
    trials = Trials(gpu, tmp_path)
    for kernel in ("quantize", "dequantize", "gemv"):
        assert trials.wins(kind(kernel), SHAPE, 1)
    assert torch.equal(torch.randn(3, device=gpu.device), expected)


def test_what_the_caller_has_set_does_not_count(gpu: GPU, tmp_path: Path) -> None:
    """Neither inference mode, nor autocast, nor a default dtype; and nothing that stays is born in inference mode."""
    trials = Trials(gpu, tmp_path)
    for table in (nf4.code, nf4.dynamic_map, codec.byte_pairs):
        table.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast(gpu.device.type, torch.bfloat16):
            assert trials.wins(kind("matmul"), SHAPE, 5), "a product in bfloat16 would be off by more than rounding"
    finally:
        torch.set_default_dtype(torch.float32)
    for table in (nf4.code, nf4.dynamic_map, codec.byte_pairs):
        assert not table(gpu.device).is_inference()


def test_a_kernel_made_wrong_on_purpose_is_not_used(
    gpu: GPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    matmul = importlib.import_module("minilora.kernels.matmul")
    right = matmul.matmul
    monkeypatch.setattr(matmul, "matmul", lambda x, q, *more: right(x.roll(1, dims=1), q, *more))
    trials = Trials(gpu, tmp_path)
    assert not trials.wins(kind("matmul"), SHAPE, 5) and trials.wins(kind("gemv"), SHAPE, 1)
    assert (
        "(matmul, float16, blocks of 64, double quantization), which failed on GPU interpreter: 3 rows" in caplog.text
    )


# --- the GPU itself ---------------------------------------------------------------------------------------------------


def test_nothing_is_tried_where_it_would_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, capturing, seen = GPU(torch.device("cuda", 0)), [False], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(gpu.is_recording())
        return x + 1

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    x = torch.ones(3)
    look(x)
    torch.compile(look, backend="eager", dynamic=False)  # which is asked for elsewhere: codec.is_traced
    assert seen == [False]
    seen.clear()
    torch.func.vmap(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    make_fx(look)(x)
    with Mode():
        look(x)
    capturing[0] = True
    look(x)
    assert len(seen) >= 5 and all(seen)


def test_a_verdict_holds_for_a_gpu_its_driver_the_versions_and_the_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton", "3.6")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fast GPU")
    gpu = GPU(torch.device("cuda", 0))
    found = gpu.identity()
    assert found["GPU"] == "Fast GPU" and found["torch"] == torch.__version__
    assert found["Triton"].split(".")[0].isdigit() and found["driver"]
    spec = importlib.util.find_spec("minilora.kernels")
    assert spec is not None and spec.origin is not None
    for file in Path(spec.origin).parent.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(
        kernel_device,
        "find_spec",
        lambda name: importlib.machinery.ModuleSpec(name, None, origin=str(tmp_path / "__init__.py")),
    )
    assert gpu.identity() == found
    with (tmp_path / "matmul.py").open("a") as file:
        file.write("# changed\n")
    assert gpu.identity()["source"] != found["source"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release Build", "570.86"),
        ("6.8.5\n", "6.8.5"),  # amdgpu's
        ("", "unknown"),
    ],
)
def test_the_driver_is_read_where_the_system_tells_it(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(kernel_device, "DRIVERS", (tmp_path / "none", tmp_path / "version"))
    assert kernel_device._driver() == expected


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_is_right_and_its_trials_are_short(tmp_path: Path) -> None:
    gpu = GPU(torch.device("cuda", 0))
    trials = Trials(gpu, tmp_path)
    for kernel in KERNELS:
        trials.wins(kind(kernel), (4096, 4096), 1)
    assert set(trials.verdicts.kinds.values()) == {""}
    assert all(0 < us < 1e4 for rows in trials.verdicts.times.values() for pair in rows.values() for us in pair)


@pytest.mark.gpu
def test_in_a_capture_what_is_known_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minilora.nf4 import dispatch

    trials = Trials(GPU(torch.device("cuda", 0)), tmp_path)
    monkeypatch.setattr(dispatch, "trials", lambda device: trials)
    layer = NF4Linear.from_linear(torch.nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.float16))
    x = torch.randn(8, 4096, device="cuda", dtype=torch.float16)
    expected = layer(x)  # tried now, for up to 8 rows
    known = dict(trials.verdicts.times)
    for rows in (x, x.repeat(8, 1)):  # known, not known
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = layer(rows)
        graph.replay()
        torch.testing.assert_close(y[:8], expected, rtol=2e-3, atol=2e-3)  # float16: another order of summation
    assert trials.verdicts.times == known
