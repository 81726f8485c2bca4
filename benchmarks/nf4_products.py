"""kernels: NF4 products and dequantization against bitsandbytes, gemlite, Unsloth and a dense weight.

On a GPU: Llama-3's linear shapes, M rows of x from 1 to 8192, weights and results in rotation so that the L2 cache does
not serve them, calls replayed from a CUDA graph so that a launch costs what it costs in a compiled model, where they
can be recorded in one (all but quantizing, and Unsloth). On a CPU: SmolLM2-135M's shapes and 4096², as the layers are
called. minilora is NF4Linear as it is, and what its trials on this very device have chosen; each way that it has on a
GPU also takes part by itself. bitsandbytes, gemlite and Unsloth do where they are installed.
"""

import gc
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import median

import torch
from torch import Tensor

from benchmarks import nf4_cases
from benchmarks.measure import Spread, machine, take_turns
from benchmarks.nf4_cases import Case, Speeds
from benchmarks.nf4_contenders import CONTENDERS, TUNED, Build, Weights, is_recorded, left_out
from benchmarks.nf4_plot import plot
from benchmarks.nf4_targets import share_of_roofline, target_lines
from benchmarks.output import Result
from minilora.errors import InputError
from minilora.nf4.dispatch import trials
from minilora.nf4.kernel_trials import Trials
from minilora.progress import with_progress

SECONDS = 330.0  # for all cases on a GPU; what is left when they are over is not timed
SETUP_SECONDS = 60.0  # for all that a contender of TUNED compiles and tunes; then it takes no further part
TURN_SECONDS = 2e-3  # at least, of one contender, so that starting a timer costs nothing


@dataclass
class Timed:
    """Seconds of one call, of each contender in each round; why others have none; seconds of building each."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    setup: dict[str, float] = field(default_factory=dict)


def run(rounds: int | None, device: torch.device, seconds: float | None = None) -> Result:
    """Time every contender on every case, in turns; on a GPU in at most so many seconds.

    What was timed before an interruption is kept. Raises InputError if that is nothing.
    """
    limit = math.inf if device.type == "cpu" else seconds or SECONDS
    deadline, rounds, where = time.monotonic() + limit, rounds or 7, machine(device)
    missing, speeds, every = left_out(device.type), nf4_cases.measured_speeds(device), nf4_cases.cases(device.type)
    timed = time_cases(every, missing, rounds, device, deadline)
    if not timed:
        raise InputError("stopped before the first case was timed")
    notes = []
    if len(timed) < len(every):
        notes.append(f"stopped early, by hand or by the clock: {len(timed)} of {len(every)} cases were timed")
    if device.type == "cuda":
        notes += target_lines({case: t.seconds for case, t in timed.items()}, speeds) + failed_kernels(device)
    return Result(
        benchmark="kernels",
        title="NF4 products and dequantization",
        machine=where,
        settings={
            "rounds": rounds,
            "bytes_per_s": speeds.bytes_per_s,
            "flops": {str(dtype).removeprefix("torch."): flops for dtype, flops in speeds.flops.items()},
        },
        rows=rows(timed, speeds),
        raw={f"{case}, {case.dtype}": t.seconds | t.failures for case, t in timed.items()},
        plot=partial(plot, {case: t.seconds for case, t in timed.items()}, speeds),
        notes=notes,
        size=(15, 8),
    )


# --- timing -----------------------------------------------------------------------------------------------------------


def time_cases(
    every: list[Case], missing: set[str], rounds: int, device: torch.device, deadline: float
) -> dict[Case, Timed]:
    """Each case that there is time for; those before an interruption."""
    timed: dict[Case, Timed] = {}
    spent: Counter[str] = Counter()
    weights = None
    with sigterm_interrupts():
        try:
            for case in with_progress(every, len(every), "kernels", "cases"):
                seconds = (deadline - time.monotonic()) / (len(every) - len(timed))
                if seconds <= 0:
                    break
                builds = {
                    name: build
                    for name, build in CONTENDERS[device.type][case.operation].items()
                    if name not in missing and not (name in TUNED and spent[name] > SETUP_SECONDS)
                }
                try:
                    if weights is None or weights.key != (case.N, case.K, case.dtype):
                        weights = None  # freed before the next are made
                        weights = Weights(case, device)
                    timed[case] = time_case(case, builds, weights, rounds, device, seconds)
                except Exception as error:  # no memory for the weights, or a kernel broke the whole process
                    timed[case] = Timed(failures=dict.fromkeys(builds, _reason(error)))
                spent.update(timed[case].setup)  # type: ignore[arg-type]  # a Counter counts seconds as well
        except KeyboardInterrupt:
            pass
    return timed


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within, SIGTERM is a KeyboardInterrupt, as Ctrl-C is: what was measured can still be written."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def time_case(
    case: Case, builds: Mapping[str, Build], weights: Weights, rounds: int, device: torch.device, seconds: float
) -> Timed:
    """Every contender on one case, in about so many seconds; one that raises is noted, and the others go on."""
    torch.manual_seed(1)
    x = torch.randn(case.x_shape, device=device).to(case.dtype)
    timed, replays = Timed(), {}
    for name, build in builds.items():
        started = time.monotonic()
        try:
            stream = _other_stream(device) if is_recorded(name, case) else None
            replays[name] = Replay.of(build, case, weights, x, stream)
        except Exception as error:
            timed.failures[name] = _reason(error)
        timed.setup[name] = time.monotonic() - started
    turns = {name: replay.turn for name, replay in replays.items()}
    try:
        times = take_turns(turns, rounds, device, warmup=1, seconds=seconds) if turns else {}
        timed.seconds = {name: [s / replays[name].calls for s in values] for name, values in times.items()}
    except Exception as error:
        timed.failures |= dict.fromkeys(turns, _reason(error))
    if device.type == "cuda":
        del replays, turns
        gc.collect()
        torch.cuda.empty_cache()  # a CUDA graph's memory is its own until then
    return timed


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


@dataclass(frozen=True)
class Replay:
    """What one contender does in a turn: `once`, which calls it with each of the weights, so many times."""

    once: Callable[[], object]
    repeats: int
    calls: int  # of the contender, in a turn
    kept: object  # the tensors that a CUDA graph reads and writes

    @classmethod
    def of(cls, build: Build, case: Case, weights: Weights, x: Tensor, stream: torch.cuda.Stream | None) -> "Replay":
        """Built, compiled and, where there is a stream for it, recorded; a turn is long enough to be timed."""
        if stream is not None:
            build(case, weights, x)  # makes the weights: bitsandbytes quantizes on the default stream in any case
            stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            call = build(case, weights, x)

            def once() -> list[Tensor]:
                # all held until the last is done, so that none is written where the L2 cache has the one before
                return [call(i) for i in range(weights.copies)]

            once()  # compiles, tunes, and fills what is cached
        recorded: Callable[[], object] = once if stream is None else _record(once, stream)
        took = take_turns({"": lambda _: recorded()}, 2, x.device, warmup=1)[""]
        repeats = max(1, min(1000, round(TURN_SECONDS / min(took))))
        return cls(recorded, repeats, repeats * weights.copies, call)

    def turn(self, round: int) -> None:
        for _ in range(self.repeats):
            self.once()


@cache
def _other_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Where to record a CUDA graph: not on the default stream, and with autograd's calls on the same one."""
    return None if device.type == "cpu" else torch.cuda.Stream(device)


def _record(once: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], object]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        once()
    replay: Callable[[], object] = graph.replay
    return replay


# --- what the times say -----------------------------------------------------------------------------------------------


def failed_kernels(device: torch.device) -> list[str]:
    """A line for each kernel that minilora's own trials have found wrong, and does not use."""
    known = trials(torch.empty(0, device=device).device)
    faults = known.verdicts.kinds if isinstance(known, Trials) else {}
    return [f"NF4Linear does not use {kind}: {fault}" for kind, fault in faults.items() if fault]


def rows(timed: Mapping[Case, Timed], speeds: Speeds) -> list[dict[str, str]]:
    """The table: minilora's time, what it achieves, its share of the roofline and its ratio to every contender."""
    names = dict.fromkeys(name for t in timed.values() for name in (*t.seconds, *t.failures) if name != "minilora")
    return [_row(case, t, list(names), speeds) for case, t in timed.items()]


def _row(case: Case, timed: Timed, names: list[str], speeds: Speeds) -> dict[str, str]:
    ours = timed.seconds.get("minilora")
    row = {"product": str(case), "dtype": str(case.dtype).removeprefix("torch.")}
    if ours is None:
        row |= {"minilora, µs": _failure(timed, "minilora"), "achieved": "–", "roofline": "–"}
    else:
        achieved = f"{case.operations / median(ours) / 1e12:.3g} TFLOP/s"
        if case.is_bound_by_bytes(speeds):
            achieved = f"{case.bytes / median(ours) / 1e9:,.0f} GB/s"
        share = share_of_roofline(case, timed.seconds, speeds)
        row |= {"minilora, µs": f"{1e6 * median(ours):.1f}", "achieved": achieved, "roofline": f"{share:.0%}"}
    for name in names:
        theirs = timed.seconds.get(name)
        if ours is None or theirs is None:
            row[f"/ {name}"] = _failure(timed, name)
        else:
            ratio = Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])
            row[f"/ {name}"] = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    return row


def _failure(timed: Timed, name: str) -> str:
    return f"failed: {timed.failures[name]}" if name in timed.failures else "–"
