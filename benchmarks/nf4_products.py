"""kernels: products with an NF4 weight, forward and backward, against bitsandbytes and a dense weight.

On a GPU: Llama-3's linear shapes, M rows of x from 1 to 8192, weights rotated so that the L2 cache does not serve them,
calls replayed from a CUDA graph so that a launch costs what it costs in a compiled model. On a CPU: SmolLM2-135M's
shapes and 4096², as the layers are called. The share of the roofline is the time that the bytes (4.127 bits a weight,
x and y once) or the operations would take at the speeds measured in the same run, whichever is longer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product, takewhile
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Spread, machine, take_turns
from benchmarks.output import Result
from minilora import nf4
from minilora.errors import InputError
from minilora.linear4bit import NF4Linear

LLAMA = {"8B q, o": (4096, 4096), "8B k, v": (1024, 4096), "8B gate, up": (14336, 4096), "8B down": (4096, 14336),
         "70B q, o": (8192, 8192), "70B gate, up": (28672, 8192), "70B down": (8192, 28672)}  # fmt: skip
SMOLLM2 = {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536), "4096²": (4096, 4096)}
ROWS = {"cuda": (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192), "cpu": (1, 16, 128, 512)}
L2_BYTES = 100e6  # of weights in rotation: twice the largest L2 cache
SECONDS_A_TURN = 2e-3  # at least, of one contender, so that starting a timer costs nothing

Call = Callable[[int], Tensor]  # the product with the i-th of the weights in rotation


@dataclass(frozen=True)
class Case:
    """One product: x (M, K) with W (N, K), or its gradient g (M, N) with W."""

    layer: str
    N: int
    K: int
    M: int
    dtype: torch.dtype
    backward: bool

    def __str__(self) -> str:
        return f"{self.layer} {self.N}x{self.K}, M={self.M}, {'backward' if self.backward else 'forward'}"

    @property
    def x_shape(self) -> tuple[int, int]:
        return (self.M, self.N if self.backward else self.K)

    def seconds_at_best(self, bytes_per_s: float, flops: float) -> float:
        """The roofline: moving W in 4.127 bits, x and y, or 2·M·N·K operations, whichever takes longer."""
        moved = self.N * self.K * 4.127 / 8 + self.M * (self.N + self.K) * self.dtype.itemsize
        return max(moved / bytes_per_s, 2 * self.M * self.N * self.K / flops)


# --- contenders ------------------------------------------------------------------------------------------------------


def minilora(case: Case, weights: list[Tensor], x: Tensor) -> Call:
    """NF4Linear as it is called in a model."""
    layers = [NF4Linear.from_linear(_linear(W)) for W in weights]
    if case.backward:
        return lambda i: _gradient(layers[i % len(layers)], x, case)
    return lambda i: layers[i % len(layers)](x)


def fused(case: Case, weights: list[Tensor], x: Tensor) -> Call:
    """The fused kernel alone, by the operator that NF4Linear calls below its crossover."""
    from minilora.kernels import ops

    packed = [ops.packed(nf4.quantize(W)) for W in weights]
    if case.backward:
        return lambda i: ops.nf4_backward(x, *packed[i % len(packed)])
    return lambda i: ops.nf4_matmul(x, *packed[i % len(packed)], None)


def one_pass(case: Case, weights: list[Tensor], x: Tensor) -> Call:
    """Dequantized by one kernel into a buffer that is used again, then multiplied by cuBLAS."""
    from minilora.kernels.dequantize import dequantize

    packed, W = [nf4.quantize(W) for W in weights], torch.empty_like(weights[0])
    if case.backward:
        return lambda i: x @ dequantize(packed[i % len(packed)], out=W)
    return lambda i: F.linear(x, dequantize(packed[i % len(packed)], out=W))


def plain(case: Case, weights: list[Tensor], x: Tensor) -> Call:
    """Dequantized in plain PyTorch, then multiplied: what NF4Linear does where no kernel is used."""
    packed, W = [nf4.quantize(W) for W in weights], torch.empty_like(weights[0])
    if case.backward:
        return lambda i: x @ nf4.dequantize(packed[i % len(packed)], out=W)
    return lambda i: F.linear(x, nf4.dequantize(packed[i % len(packed)], out=W))


def bitsandbytes(case: Case, weights: list[Tensor], x: Tensor) -> Call:
    """Linear4bit with double quantization, which chooses between its fused kernel and dequantize + matmul itself."""
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        raise InputError("this benchmark needs bitsandbytes: pip install bitsandbytes") from None
    layers = []
    for W in weights:
        layer = Linear4bit(case.K, case.N, False, case.dtype, True, "nf4")
        layer.load_state_dict({"weight": W.cpu()})
        layers.append(layer.to(W.device).requires_grad_(False))
    if case.backward:
        return lambda i: _gradient(layers[i % len(layers)], x, case)
    return lambda i: layers[i % len(layers)](x)


def dense(case: Case, weights: list[Tensor], x: Tensor) -> Call:
    """The weight unquantized."""
    if case.backward:
        return lambda i: x @ weights[i % len(weights)]
    return lambda i: F.linear(x, weights[i % len(weights)])


def _linear(W: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(W, requires_grad=False)
    return linear


def _gradient(layer: torch.nn.Module, g: Tensor, case: Case) -> Tensor:
    """dL/dx of a layer, without the forward product: its graph is made once, on an input of zeros."""
    graphs = layer.__dict__.setdefault("_graphs", {})
    if case.M not in graphs:
        x = torch.zeros(case.M, case.K, dtype=g.dtype, device=g.device, requires_grad=True)
        graphs[case.M] = (x, layer(x))
    x, y = graphs[case.M]
    return torch.autograd.grad(y, x, g, retain_graph=True)[0]


PEERS: dict[str, Callable[[Case, list[Tensor], Tensor], Call]] = {"bitsandbytes": bitsandbytes, "dense": dense}
CONTENDERS = {
    "cuda": {
        "minilora": minilora,
        "fused kernel": fused,
        "one-pass + cuBLAS": one_pass,
        "plain PyTorch": plain,
        **PEERS,
    },
    "cpu": {"minilora": minilora, **PEERS},
}


# --- the benchmark ---------------------------------------------------------------------------------------------------


def cases(kind: str) -> list[Case]:
    """Every shape, number of rows and direction; float32 too on a CPU, where it is what many people train in."""
    shapes = LLAMA if kind == "cuda" else SMOLLM2
    dtypes = (torch.bfloat16,) if kind == "cuda" else (torch.bfloat16, torch.float32)
    order = product(dtypes, shapes.items(), (False, True), ROWS[kind])
    return [Case(layer, N, K, M, dtype, backward) for dtype, (layer, (N, K)), backward, M in order]


def run(rounds: int | None, device: torch.device) -> Result:
    """Time every contender on every case, in turns."""
    from rich.progress import track

    rounds, where = rounds or 7, machine(device)
    bytes_per_s, flops = measured_speeds(device)
    seconds = {case: time_case(case, rounds, device) for case in track(cases(device.type), "products")}
    return Result(
        benchmark="kernels",
        title="Products with an NF4 weight; ratios: minilora's time over the peer's",
        machine=where,
        settings={
            "rounds": rounds,
            "bytes_per_s": bytes_per_s,
            "bfloat16_flops": flops,
            "crossovers": crossovers(seconds) if device.type == "cuda" else None,
        },
        rows=[_row(case, times, bytes_per_s, flops) for case, times in seconds.items()],
        raw={f"{case}, {case.dtype}": times for case, times in seconds.items()},
        plot=partial(_plot, seconds),
    )


def crossovers(seconds: Mapping[Case, Mapping[str, list[float]]]) -> dict[str, Any]:
    """Up to which M the fused kernels win over one pass and cuBLAS, as the median over shapes has it, each direction.

    What minilora.kernel_dispatch takes; the one-pass kernel is used where it beats PyTorch's path at the largest M.
    """

    def median_ratio(M: int, backward: bool, ours: str, theirs: str) -> float:
        times = [t for case, t in seconds.items() if (case.M, case.backward) == (M, backward)]
        return median(Spread.of(t[ours]).median / Spread.of(t[theirs]).median for t in times)

    rows = sorted({case.M for case in seconds})
    found: dict[str, Any] = {}
    for direction, backward in (("forward", False), ("backward", True)):
        ratios = {M: median_ratio(M, backward, "fused kernel", "one-pass + cuBLAS") for M in rows}
        found[direction] = max(takewhile(lambda M: ratios[M] <= 1, rows), default=0)  # noqa: B023 - used at once
    return found | {"dequantize": median_ratio(rows[-1], False, "one-pass + cuBLAS", "plain PyTorch") <= 1}


def time_case(case: Case, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of one product, of each contender in each round."""
    torch.manual_seed(0)
    copies = max(1, min(32, round(L2_BYTES / (case.N * case.K / 2)))) if device.type == "cuda" else 1
    weights = [(torch.randn(case.N, case.K, device=device) / case.K**0.5).to(case.dtype) for _ in range(copies)]
    x = torch.randn(case.x_shape, device=device).to(case.dtype)
    calls = {name: build(case, weights, x) for name, build in CONTENDERS[device.type].items()}
    replays = {name: _replay(call, copies, device) for name, call in calls.items()}
    turns = {name: (lambda _, r=replay: r[0]()) for name, replay in replays.items()}
    times = take_turns(turns, rounds, device, warmup=2)
    return {name: [s / replays[name][1] for s in values] for name, values in times.items()}


def _replay(call: Call, copies: int, device: torch.device) -> tuple[Callable[[], None], int]:
    """What to do in one turn, and how many products that is: on a GPU a graph of one for each weight, over and over."""

    def each_weight() -> None:
        for i in range(copies):
            call(i)

    once: Callable[[], None] = each_weight
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            each_weight()  # compiles, and fills what is cached
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            each_weight()
        once = graph.replay
    took = take_turns({"once": lambda _: once()}, 3, device, warmup=1)["once"]
    repeats = max(1, min(1000, round(SECONDS_A_TURN / min(took))))

    def turn() -> None:
        for _ in range(repeats):
            once()

    return turn, repeats * copies


def measured_speeds(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), and operations a second of a large bfloat16 product."""
    big = device.type == "cuda"
    source = torch.empty(2**30 if big else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if big else 2048
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    work: dict[str, Call] = {"copy": lambda _: target.copy_(source), "product": lambda _: torch.mm(a, b)}
    times = take_turns(work, 9, device, warmup=3)
    return 2 * source.numel() / min(times["copy"]), 2 * n**3 / min(times["product"])


def _row(case: Case, times: dict[str, list[float]], bytes_per_s: float, flops: float) -> dict[str, str]:
    ours = times["minilora"]
    row = {"product": str(case), "dtype": str(case.dtype).removeprefix("torch."), "minilora, µs": _microseconds(ours)}
    for name, theirs in times.items():
        if name != "minilora":
            ratio = Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])
            row[f"/ {name}"] = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    share = case.seconds_at_best(bytes_per_s, flops) / Spread.of(ours).median
    return row | {"roofline": f"{share:.0%}"}


def _microseconds(seconds: list[float]) -> str:
    return f"{1e6 * Spread.of(seconds).median:.1f}"


def _plot(seconds: dict[Case, dict[str, list[float]]], figure: Any) -> None:
    """One panel a direction: time over M, each contender a colour, each shape a line; in the first dtype."""
    first = next(iter(seconds)).dtype
    for axes, backward in zip(figure.subplots(1, 2), (False, True), strict=True):
        layers = dict.fromkeys(case.layer for case in seconds)
        for (n, layer), (i, name) in product(enumerate(layers), enumerate(next(iter(seconds.values())))):
            points = [
                (case.M, 1e6 * Spread.of(times[name]).median)
                for case, times in seconds.items()
                if case.layer == layer and case.backward == backward and case.dtype == first
            ]
            axes.plot(*zip(*points, strict=True), f"C{i}", marker=".", alpha=0.8, label=name if n == 0 else None)
        axes.set(xscale="log", yscale="log", xlabel="M, rows of x", ylabel="µs")
        axes.set_title(f"{'backward' if backward else 'forward'}, {str(first)[6:]}: a line is a shape", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
