"""The benchmark of NF4 products on tiny shapes, and what is made of its numbers. Speed itself is never asserted."""

import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import types
from itertools import count

import pytest
import torch

from minilora import nf4
from minilora.auto_dtype import DtypeChoice
from minilora.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def tiny(benchmarks, monkeypatch):
    """The benchmark on one shape, at a made-up roofline; returns nf4_products."""
    pytest.importorskip("bitsandbytes")
    speeds = benchmarks.nf4_cases.Speeds(1e10, {torch.bfloat16: 1e11, torch.float32: 5e10})
    monkeypatch.setattr(benchmarks.nf4_cases, "SMOLLM2", {"q": (64, 128)})
    monkeypatch.setitem(benchmarks.nf4_cases.ROWS, "cpu", (1, 4))
    monkeypatch.setattr(benchmarks.nf4_cases, "measured_speeds", lambda device: speeds)
    # both, on a CPU without instructions for bfloat16 too: the products are small
    monkeypatch.setattr(benchmarks.nf4_cases, "dtypes", lambda kind: (torch.bfloat16, torch.float32))
    monkeypatch.setattr(benchmarks.nf4_products, "TURN_SECONDS", 1e-4)
    return benchmarks.nf4_products


@pytest.mark.parametrize("fast, measured", [(True, (torch.bfloat16, torch.float32)), (False, (torch.float32,))])
def test_a_cpu_is_measured_in_bfloat16_where_it_has_instructions_for_that(benchmarks, monkeypatch, fast, measured):
    choice = DtypeChoice(torch.bfloat16 if fast else torch.float32, "for a test")
    monkeypatch.setattr(benchmarks.nf4_cases, "auto_dtype", lambda device: choice)
    assert benchmarks.nf4_cases.dtypes("cpu") == measured
    assert benchmarks.nf4_cases.dtypes("cuda") == (torch.bfloat16,)


def case_of(benchmarks, operation, M=1, N=4096, K=4096, layer="test", dtype=torch.bfloat16):
    return benchmarks.nf4_cases.Case(layer, N, K, M, dtype, operation)


def computed(operation, W, x):
    if operation == "quantize":
        return nf4.quantize(W).codes
    return W if operation == "dequantize" else x @ W if operation == "backward" else x @ W.T


# --- contenders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["dequantize", "forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_contenders_compute_the_same(benchmarks, operation, dtype):
    pytest.importorskip("bitsandbytes")
    contenders = benchmarks.nf4_contenders
    case = case_of(benchmarks, operation, 0 if operation == "dequantize" else 3, 96, 128, dtype=dtype)
    weights = contenders.Weights(case, CPU)
    torch.manual_seed(0)
    x = torch.randn(case.x_shape).to(dtype)
    results = {
        name: build(case, weights, x)(0).double() for name, build in contenders.CONTENDERS["cpu"][operation].items()
    }
    # in float64 from the 4-bit weight that both libraries agree on to the bit
    expected = computed(operation, nf4.dequantize(nf4.quantize(weights.dense[0]), torch.float64), x.double())
    for name, result in results.items():
        # dense: NF4's own error, some 10% of a weight, averages out over the sum. bfloat16 has 8 bits, and W and the
        # result are rounded to it; so is x by bitsandbytes' inference on a CPU that multiplies bfloat16. float32: 24.
        rough = dtype == torch.bfloat16 or (name, operation) == ("bitsandbytes", "forward")
        tolerance = 0.15 if name == "dense" else 2**-7 if rough else 2**-20
        assert (result - expected).norm() < tolerance * expected.norm(), name


@pytest.mark.parametrize("operation", ["quantize", "dequantize", "forward", "backward"])
def test_our_contenders_on_a_gpu_compute_the_same(benchmarks, operation):
    """In Triton's interpreter, where there is no GPU."""
    device = importlib.import_module("helpers.kernels").DEVICE  # or skips, without a Triton that can
    contenders = benchmarks.nf4_contenders
    case = case_of(benchmarks, operation, 2 if "ward" in operation else 0, 64, 128, dtype=torch.float32)
    weights = contenders.Weights(case, device)
    x = torch.randn(case.x_shape, device=device)
    W = weights.dense[0] if operation == "quantize" else nf4.dequantize(weights.quantized[0], torch.float32)
    expected = computed(operation, W, x)
    builds = contenders.CONTENDERS["cuda"][operation]
    ours = {
        "minilora",
        "quantize kernel",
        "one-pass kernel",
        "plain PyTorch",
        "fused kernel",
        "fused, other table",
        "one-pass + cuBLAS",
    } & builds.keys()
    assert len(ours) == (4 if "ward" in operation else 3)
    for name in ours:
        # float32, another order of summation
        torch.testing.assert_close(builds[name](case, weights, x)(0), expected, rtol=1e-4, atol=1e-5, msg=name)


def test_the_calls_take_the_weights_in_turn(benchmarks):
    pytest.importorskip("bitsandbytes")
    contenders = benchmarks.nf4_contenders
    for operation, builds in contenders.CONTENDERS["cpu"].items():
        case = case_of(benchmarks, operation, 0 if operation == "dequantize" else 2, 64, 64, dtype=torch.float32)
        weights = contenders.Weights(case, CPU)
        weights.dense.append(weights.dense[0] + 1)
        for name, build in builds.items():
            call = build(case, weights, torch.ones(case.x_shape))
            first, second, again = (call(i).clone() for i in range(3))
            assert torch.equal(first, again) and not torch.allclose(first, second), name


def test_bitsandbytes_layers_dequantize_to_the_weights_own_dtype(benchmarks):
    """As transformers makes them; from float32 a bfloat16 layer would make its weight in float32, and cast it."""
    pytest.importorskip("bitsandbytes")
    weights = benchmarks.nf4_contenders.Weights(case_of(benchmarks, "forward", 1, 64, 128), CPU)
    before = weights.dense[0].clone()
    for layer in (*weights.linear4bit, *weights.linear4bit_eval):
        assert layer.weight.quant_state.dtype == torch.bfloat16
    assert torch.equal(weights.dense[0], before), "it is quantized, not replaced"


@pytest.mark.parametrize("cache", [50 * 2**20, 126 * 2**20], ids=["H100", "B200"])
def test_the_weights_in_rotation_exceed_the_cache(benchmarks, cache):
    for N, K in benchmarks.nf4_cases.LLAMA.values():
        copies = benchmarks.nf4_contenders.in_rotation(N * K / 2, cache)
        assert copies * N * K / 2 >= 2 * cache
    assert benchmarks.nf4_contenders.in_rotation(1e9, cache) == 1
    assert benchmarks.nf4_contenders.in_rotation(1e3, cache) == benchmarks.nf4_contenders.MOST_COPIES


def test_gemlites_stand_in_is_an_affine_4_bit_weight(benchmarks):
    torch.manual_seed(0)
    W = torch.randn(8, 256)
    codes, scales, zeros = benchmarks.nf4_contenders.affine_int4(W)
    assert codes.dtype == torch.uint8 and codes.shape == W.shape and scales.shape == zeros.shape == (8, 4)
    assert codes.min() == 0 and codes.max() == 15
    back = (codes.view(8, 4, 64) - zeros[..., None]) * scales[..., None]
    # half a step of the grid, and float32's rounding
    assert ((back - W.view(8, 4, 64)).abs() <= 0.501 * scales[..., None]).all()


def test_a_contender_whose_package_is_missing_is_left_out_in_one_line(benchmarks, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    left_out = benchmarks.nf4_contenders.left_out
    monkeypatch.setitem(sys.modules, "gemlite", None)
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    assert left_out("cuda") == {"gemlite, affine int4"}
    assert capsys.readouterr().out.count("\n") == 1
    assert left_out("cpu") == set()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert left_out("cpu") == {"bitsandbytes", "bitsandbytes, dequantized"}
    assert "bitsandbytes is left out: ModuleNotFoundError: " in capsys.readouterr().out


def test_unsloth_is_called_as_its_layers_call_it(benchmarks, monkeypatch):
    """Its functions, replaced by what they compute: packed weight and state arrive, a single row goes to the gemv."""
    functional = pytest.importorskip("bitsandbytes.functional")
    called = []

    def fast_gemv(x, W, state):
        called.append("gemv")
        assert x.shape == (1, 1, 128)
        return x @ functional.dequantize_4bit(W, state).T

    def matmul_lora(x, W, state, A, B, s):
        called.append("matmul")
        assert A is None
        return x @ functional.dequantize_4bit(W, state).T

    utils = types.SimpleNamespace(
        fast_gemv=fast_gemv, matmul_lora=matmul_lora, fast_dequantize=functional.dequantize_4bit
    )
    monkeypatch.setitem(sys.modules, "unsloth.kernels.utils", utils)
    contenders = benchmarks.nf4_contenders
    for operation, M in (("forward", 1), ("forward", 3), ("backward", 3), ("dequantize", 0)):
        case = case_of(benchmarks, operation, M, 96, 128, dtype=torch.float32)
        weights = contenders.Weights(case, CPU)
        x = torch.randn(case.x_shape)
        theirs = contenders.CONTENDERS["cuda"][operation]["Unsloth"](case, weights, x)(0)
        ours = contenders.CONTENDERS["cpu"][operation]["minilora"](case, weights, x)(0)
        torch.testing.assert_close(theirs, ours)  # the same float32 weight, another order of summation
    assert called == ["gemv", "matmul"]


# --- timing -----------------------------------------------------------------------------------------------------------


def test_kernels_on_a_cpu_from_end_to_end(benchmarks, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minilora.progress.clock", count(step=60).__next__)
    result = tiny.run(2, CPU)
    assert re.search(r"^kernels: 9 of 10 cases · [\d:]+ left$", capsys.readouterr().err, re.MULTILINE)
    assert len(result.rows) == 2 * (1 + 2 * 2)  # dtypes; the dequantization, and directions by rows
    columns = ["product", "dtype", "minilora, µs", "achieved", "roofline", "/ bitsandbytes"]
    assert list(result.rows[0]) == [*columns, "/ bitsandbytes, dequantized", "/ dense"]
    assert result.rows[0]["/ dense"] == "–", "a dense weight need not be dequantized"
    assert "–" not in result.rows[1].values()
    assert all(len(values) == 2 for times in result.raw.values() for values in times.values())
    assert result.notes == []
    json_path, png_path = benchmarks.output.write(result, tmp_path)
    assert json.loads(json_path.read_text())["rows"] == result.rows
    assert png_path.read_bytes().startswith(b"\x89PNG")
    benchmarks.output.print_table(result)
    assert "minilora" in capsys.readouterr().out


def test_a_contender_that_fails_is_named_and_the_others_go_on(benchmarks, tiny, monkeypatch):
    def broken(case, weights, x):
        if case.M == 4:
            raise RuntimeError("no such kernel\nand more")
        return lambda i: x

    forward = benchmarks.nf4_contenders.CONTENDERS["cpu"]["forward"]
    monkeypatch.setitem(forward, "dense", broken)
    monkeypatch.setitem(benchmarks.nf4_contenders.CONTENDERS["cpu"], "forward", forward | {"minilora": broken})
    result = tiny.run(1, CPU)
    found = {row["product"]: row for row in result.rows if row["dtype"] == "float32"}
    one, four = found["q 64x128, M=1, forward"], found["q 64x128, M=4, forward"]
    assert float(one["minilora, µs"]) > 0
    assert four["minilora, µs"] == four["/ dense"] == "failed: RuntimeError: no such kernel"
    assert four["/ bitsandbytes"] == "–", "there is nothing to compare with"
    assert len(result.raw["q 64x128, M=4, forward, torch.float32"]["bitsandbytes"]) == 1


def test_weights_that_cannot_be_made_fail_the_case_and_not_the_run(benchmarks, tiny, monkeypatch):
    def no_memory(case, device):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(tiny, "Weights", no_memory)
    result = tiny.run(1, CPU)
    assert len(result.rows) == 10
    assert {row["minilora, µs"] for row in result.rows} == {"failed: OutOfMemoryError: out of memory"}


@pytest.mark.parametrize("broken", ["nothing", "one case"])
def test_a_gpus_run_takes_every_case_and_names_the_kernels_that_are_wrong(benchmarks, monkeypatch, broken):
    """With made-up times."""
    products, cases = benchmarks.nf4_products, benchmarks.nf4_cases
    speeds = cases.Speeds(3e12, {torch.bfloat16: 7e14})

    def time_case(case, builds, weights, rounds, device, seconds):
        if broken == "one case" and case.M == 64 and case.layer == "8B down" and case.operation == "forward":
            raise RuntimeError("broken")
        return products.Timed({name: [4.0 * case.seconds_at_best(speeds)] * rounds for name in builds})

    monkeypatch.setattr(products, "left_out", lambda kind: {"Unsloth"})
    monkeypatch.setattr(cases, "measured_speeds", lambda device: speeds)
    monkeypatch.setattr(products, "Weights", lambda case, device: types.SimpleNamespace(key=None))
    monkeypatch.setattr(products, "time_case", time_case)
    monkeypatch.setattr(products, "failed_kernels", lambda device: ["NF4Linear does not use gemv: wrong"])
    monkeypatch.setattr(products, "machine", lambda device: {"device": "made-up"})
    result = products.run(3, torch.device("cuda"))
    assert len(result.rows) == 7 * (2 + 2 * 11) and "/ Unsloth" not in result.rows[0]
    failed = [row["product"] for row in result.rows if row["minilora, µs"] == "failed: RuntimeError: broken"]
    assert failed == ["8B down 4096x14336, M=64, forward"] * (broken == "one case")
    assert len(result.notes) == len(benchmarks.nf4_targets.TARGETS) + 1
    assert result.notes[-1] == "NF4Linear does not use gemv: wrong"


def test_what_trials_have_found_wrong_is_said(benchmarks, monkeypatch):
    products, kinds = benchmarks.nf4_products, {"gemv, float16": "off by nan", "matmul, float16": ""}
    assert products.failed_kernels(CPU) == []
    known = products.Trials.__new__(products.Trials)
    known.verdicts = types.SimpleNamespace(kinds=kinds)
    monkeypatch.setattr(products, "trials", lambda device: known)
    assert products.failed_kernels(CPU) == ["NF4Linear does not use gemv, float16: off by nan"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_timed_before_an_interruption_is_kept(benchmarks, tiny, monkeypatch, number):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time_case, done = tiny.time_case, []

    def interrupted(*args):
        if len(done) == 3:
            os.kill(os.getpid(), number)
        done.append(args)
        return time_case(*args)

    monkeypatch.setattr(tiny, "time_case", interrupted)
    try:
        result = tiny.run(1, CPU)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "as it was before"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(result.rows) == 3
    assert result.notes == ["stopped early, by hand or by the clock: 3 of 10 cases were timed"]


def test_no_case_is_begun_after_the_deadline(benchmarks, tiny, monkeypatch):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(tiny, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    given = []
    monkeypatch.setattr(tiny, "time_case", lambda *args: given.append(args[-1]) or tiny.Timed())
    every = benchmarks.nf4_cases.cases("cpu")
    timed = tiny.time_cases(every, set(), 5, CPU, deadline=35)
    assert list(timed) == every[:4]
    assert given == [3.5, 25 / 9, 15 / 8, 5 / 7], "what is left, divided among the cases that are left"


def test_an_optional_contender_that_takes_too_long_to_tune_takes_no_further_part(benchmarks, tiny, monkeypatch):
    contenders = benchmarks.nf4_contenders
    for builds in contenders.CONTENDERS["cpu"].values():
        monkeypatch.setitem(builds, "Unsloth", lambda case, weights, x: lambda i: x)
    asked = []

    def slow(case, builds, *rest):
        asked.append("Unsloth" in builds)
        assert "minilora" in builds
        return tiny.Timed(setup={"Unsloth": 25.0, "minilora": 1000.0})

    monkeypatch.setattr(tiny, "time_case", slow)
    tiny.time_cases(benchmarks.nf4_cases.cases("cpu")[:5], set(), 5, CPU, deadline=float("inf"))
    assert asked == [True, True, True, False, False]  # 25, 50, 75 seconds


def test_a_turn_is_of_every_weight_and_no_result_lies_where_another_does(benchmarks):
    case = case_of(benchmarks, "forward", 4, 64, 64, dtype=torch.float32)
    weights = benchmarks.nf4_contenders.Weights(case, CPU)
    weights.copies = 5
    made = []

    def build(case, weights, x):
        def call(i):
            y = x @ weights.dense[0]
            made.append((i, y.data_ptr()))
            return y

        return call

    replay = benchmarks.nf4_products.Replay.of(build, case, weights, torch.ones(4, 64), None)
    assert [i for i, _ in made[:5]] == list(range(5))
    assert len({address for _, address in made[:5]}) == 5
    made.clear()
    replay.turn(0)
    assert len(made) == replay.calls == 5 * replay.repeats


def test_rounds_end_early_but_not_before_three(benchmarks):
    measure = sys.modules["benchmarks.measure"]
    turns = []
    taken = measure.take_turns({"A": turns.append}, 100, CPU, warmup=1, seconds=0)
    assert len(taken["A"]) == 3 and turns == [0, 1, 2, 3]
    assert len(measure.take_turns({"A": turns.append}, 2, CPU, warmup=1, seconds=0)["A"]) == 2


# --- what the times say -----------------------------------------------------------------------------------------------


def test_a_share_of_the_roofline_is_that_of_the_slower_limit(benchmarks):
    h100 = benchmarks.nf4_cases.Speeds(3.35e12, {torch.bfloat16: 989e12})  # by its datasheet
    one, many = case_of(benchmarks, "forward", 1), case_of(benchmarks, "forward", 8192)
    assert one.seconds_at_best(h100) == pytest.approx(2.6e-6, rel=0.01)  # 4.127 bits at 3.35 TB/s
    assert many.seconds_at_best(h100) == pytest.approx(2 * 8192 * 4096**2 / 989e12)
    assert one.is_bound_by_bytes(h100) and not many.is_bound_by_bytes(h100)
    # 4.127 bits in and 16 out
    alone = case_of(benchmarks, "dequantize", 0)
    assert alone.seconds_at_best(h100) == pytest.approx(4096**2 * 20.127 / 8 / 3.35e12, rel=1e-4)


def test_targets_are_met_or_missed_by_the_worst_case(benchmarks):
    speeds = benchmarks.nf4_cases.Speeds(1e12, {torch.bfloat16: 1e15})
    timed = {}
    shapes = [("8B gate, up", 14336, 4096), ("8B down", 4096, 14336), ("70B q, o", 8192, 8192)]
    for layer, N, K in shapes:
        for operation, M in (("dequantize", 0), ("forward", 1), ("forward", 64), ("backward", 1), ("forward", 512)):
            case = case_of(benchmarks, operation, M, N, K, layer)
            best = case.seconds_at_best(speeds)
            faster = {0: 1.0, 1: 1.5, 64: 1.25, 512: 0.95}[M]
            share = {"8B gate, up": 0.9, "8B down": 0.61, "70B q, o": 0.79}[layer]
            timed[case] = {
                "minilora": [best / share] * 3,
                "bitsandbytes": [best / share * 2] * 3,
                "bitsandbytes, dequantized": [best / share * faster] * 3,  # the faster one counts
            }
    lines = benchmarks.nf4_targets.target_lines(timed, speeds)
    expected = [
        "at least 80%: missed, 79% at worst (70B q, o 8192x8192, M=1, forward), 79% median",
        "at least 60%: met, 61% at worst (8B down 4096x14336, M=1, forward), 76% median",
        "at least 1.20: met, 1.25 at worst (",
        "at least 1.00: missed, 0.95 at worst (",
        "at least 85%: missed, 61% at worst (8B down 4096x14336, dequantize), 79% median",
    ]
    assert len(lines) == len(expected)
    for line, end in zip(lines, expected, strict=True):
        assert end in line


def test_a_target_says_what_was_not_measured(benchmarks):
    speeds = benchmarks.nf4_cases.Speeds(1e12, {torch.bfloat16: 1e15})
    cases = [case_of(benchmarks, "dequantize", 0, layer=layer) for layer in "ab"]
    lines = benchmarks.nf4_targets.target_lines({cases[0]: {"minilora": [1e-9]}, cases[1]: {}}, speeds)
    assert [line.endswith(": not measured") for line in lines] == [True, True, True, True, False]
    assert "met as far as measured (1 of 2 cases)" in lines[-1]


# --- gpu --------------------------------------------------------------------------------------------------------------


def timed_result(benchmarks):
    return benchmarks.output.Result("kernels", "", {}, {}, [], {}, lambda figure: None, ["a target"])


def test_gpu_says_that_it_needs_one(benchmarks):
    with pytest.raises(InputError, match="needs a CUDA device"):
        benchmarks.gpu.run(1, CPU)


@pytest.mark.parametrize("wrong", ["kernels", "others"])
def test_gpu_names_the_tests_that_fail_and_keeps_the_times(benchmarks, monkeypatch, wrong):
    gpu = benchmarks.gpu

    def tested(command, **options):
        if (wrong == "others") != (command[-1] == "gpu"):
            return subprocess.CompletedProcess(command, 0, "..\n")
        said = ".F\nFAILED tests/test_a.py::test_b - AssertionError: c\n1 failed"
        return subprocess.CompletedProcess(command, 1, said)

    monkeypatch.setattr(gpu.subprocess, "run", tested)
    monkeypatch.setattr(gpu.nf4_products, "run", lambda *args, **options: timed_result(benchmarks))
    result = gpu.run(1, torch.device("cuda"))
    assert result.notes == ["a target", "FAILED tests/test_a.py::test_b - AssertionError: c"]


def test_gpu_s_tests_end_in_time_and_what_cannot_run_has_not_passed(benchmarks, monkeypatch, tmp_path, capsys):
    gpu = benchmarks.gpu
    monkeypatch.setattr("minilora.progress.clock", count(step=60).__next__)
    monkeypatch.setattr("minilora.progress.HEARTBEAT", 0.01)
    monkeypatch.setattr(gpu, "PROCESSES", 0)
    file = tmp_path / "test_it.py"
    file.write_text("import time\n\ndef test_slow():\n    time.sleep(20)\n")
    assert "more than the 0 seconds that there were" in gpu.failures([str(file)], 0.2)[0]
    assert re.match(r"gpu, tests · [\d:]+ so far\n", capsys.readouterr().err)
    file.write_text("import no_such_package\n")
    (line,) = gpu.failures([str(file)], 60)
    assert line.startswith("ERROR ") and "test_it.py" in line
    file.write_text(f"def test_wrong():\n    assert False, '{'so much ' * 10}is wrong'\n")
    (line,) = gpu.failures([str(file)], 60)
    assert line.startswith("FAILED ") and line.endswith("is wrong"), "cut off"
    monkeypatch.setattr(gpu.sys, "executable", "false")
    assert gpu.failures([str(file)], 60)[0].endswith("ended with status 1")


def test_gpu_runs_the_kernels_tests_and_those_marked_gpu_in_time(benchmarks, monkeypatch):
    gpu, commands = benchmarks.gpu, []

    def passed(command, **options):
        assert options["env"]["TRITON_INTERPRET"] == "0", "tests in the interpreter say nothing of the GPU"
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "")

    def timed(rounds, device, seconds):
        assert 0 < seconds <= gpu.SECONDS
        return timed_result(benchmarks)

    monkeypatch.setattr(gpu.subprocess, "run", passed)
    monkeypatch.setattr(gpu.nf4_products, "run", timed)
    assert gpu.run(1, torch.device("cuda")).notes == ["a target"]
    named = " ".join(commands[0])
    assert "kernels/test_matmul.py" in named and "test_aot.py" not in named
    assert commands[1][-2:] == ["-m", "gpu"]
    named = " ".join(commands[1])
    assert "models/test_attention.py" in named and "app/test_cli.py" not in named, "which has no test for a GPU"


def test_what_launches_on_the_default_stream_is_not_recorded(benchmarks, monkeypatch):
    """A CUDA graph of it would be empty, and very fast."""
    products, streams = benchmarks.nf4_products, {}

    def of(build, case, weights, x, stream):
        streams[build, case.operation] = stream
        raise RuntimeError("enough")

    monkeypatch.setattr(products, "_other_stream", lambda device: "another stream")
    monkeypatch.setattr(products.Replay, "of", of)
    for operation in ("quantize", "dequantize", "forward"):
        case = case_of(benchmarks, operation, 2 if operation == "forward" else 0, 64, 64)
        products.time_case(case, {"dense": "dense", "Unsloth": "Unsloth"}, None, 1, CPU, 1.0)
    recorded = {key for key, stream in streams.items() if stream is not None}
    assert recorded == {("dense", "dequantize"), ("dense", "forward")} and len(streams) == 6


@pytest.mark.gpu
def test_every_contender_on_a_gpu(benchmarks):
    """Correct on the GPU itself, replayed from a graph, with weights in turn."""
    contenders, products = benchmarks.nf4_contenders, benchmarks.nf4_products
    device = torch.device("cuda")
    missing = contenders.left_out("cuda")
    for operation, builds in contenders.CONTENDERS["cuda"].items():
        case = case_of(benchmarks, operation, 16 if "ward" in operation else 0, 256, 512)
        weights = contenders.Weights(case, device)
        x = torch.randn(case.x_shape, device=device).to(case.dtype)
        expected = computed(operation, weights.dense[0].float(), x.float()).float()
        for name in builds.keys() - missing:
            result = builds[name](case, weights, x)(0).float()
            # NF4's own error, some 10% of a weight
            assert (result - expected).norm() < 0.15 * expected.norm(), name
        timed = products.time_case(case, {n: builds[n] for n in builds.keys() - missing}, weights, 3, device, 10.0)
        assert not timed.failures
        assert set(timed.seconds) == builds.keys() - missing
