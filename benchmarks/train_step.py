"""train: LoRA and QLoRA training steps of SmolLM2-135M (on a GPU of 1B and 8B) against PEFT, TRL and Unsloth.

Contenders take turns, a step each, every one in its own process (benchmarks/turns.py) and trained the way its
documentation has it (benchmarks/training_contenders.py): same base, same start, same rows in the same order, so that
their losses should lie on each other. Two runs are long enough to say so: 50 steps in float32, whose every loss is
compared with PEFT's, and 33 in bfloat16 at the demo's learning rate, after which the loss of held-out rows is. How far
TRL, which runs PEFT's own model, is off PEFT's losses says what rounding alone does. Tokens are real ones, padding not
counted; the demo's rows are learned in their answers, the others in every token.
The floor is the time of the operations that no step can do without (training_cases.least_flops) at the speed of a
large product in the same dtype, measured in the same run; gradient checkpointing's second forward is not in it.
Left out to keep the run short: checkpointing on short rows. Left out where the CPU has no instructions for bfloat16:
all cases in it.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import nn

from benchmarks.measure import Spread, machine, take_turns
from benchmarks.nf4_cases import dtypes, measured_speeds
from benchmarks.output import Result
from benchmarks.training_cases import (
    CASES,
    LORA,
    MAX_GRAD_NORM,
    MODEL,
    SEED,
    WARMUP,
    Case,
    Task,
    base_weights,
    least_flops,
    make_task,
)
from benchmarks.training_contenders import ALSO, CONTENDERS, PAD
from benchmarks.training_plot import figure_size, plot
from benchmarks.turns import Contender, Runner, Trained
from minilora.errors import InputError
from minilora.progress import with_progress
from minilora.training.loss import held_out_loss

PEER = "PEFT"
OPTIONAL = ("TRL", "Unsloth")  # left out where they cannot run; without the others there is nothing to compare


@dataclass
class Measured:
    """One case: the real tokens and least seconds of each counted round, and of each contender what it did in them."""

    tokens: list[int]
    least_seconds: list[float]
    seconds: dict[str, list[float]]
    trained: dict[str, Trained]
    left_out: dict[str, str] = field(default_factory=dict)

    def tokens_per_s(self, name: str) -> list[float]:
        """Real tokens a second in each round."""
        return [n / s for n, s in zip(self.tokens, self.seconds[name], strict=True)]

    def ratio(self, name: str) -> Spread:
        """Of the speed to PEFT's, round by round."""
        return Spread.of([theirs / s for theirs, s in zip(self.seconds[PEER], self.seconds[name], strict=True)])

    def share_of_floor(self, name: str) -> float:
        """Least seconds over seconds: 1 would be nothing but matrix products at their best speed."""
        return Spread.of([least / s for least, s in zip(self.least_seconds, self.seconds[name], strict=True)]).median

    def loss_difference(self, name: str) -> float:
        """The largest difference of a step's loss to PEFT's, relative to it."""
        pairs = zip(self.trained[name].losses, self.trained[PEER].losses, strict=True)
        return max(abs(loss - theirs) / theirs for loss, theirs in pairs)


def run(rounds: int | None, device: torch.device, only: str | None = None) -> Result:
    """Time the cases whose name contains `only`; `rounds` overrides the steps that each of them counts."""
    if device.type not in CASES:
        raise InputError(f"the benchmark 'train' runs on {' and '.join(CASES)}, not on {device.type}")
    where = machine(device)
    possible = [case for case in CASES[device.type] if case.dtype in dtypes(device.type)]
    cases = {str(case): case for case in possible if only is None or only.lower() in str(case).lower()}
    if not cases:
        names = "; ".join(str(case) for case in possible)
        raise InputError(f"no configuration has {only!r} in its name; there are {names}")
    flops = measured_speeds(device).flops
    measured = {
        name: measure(case, rounds or case.rounds, _contenders(case, device), flops[case.dtype], device)
        for name, case in with_progress(cases.items(), len(cases), "train", "configurations")
    }
    return Result(
        benchmark="train" if only is None else "train-" + re.sub(r"\W+", "-", only.lower()),
        title="Training steps: real tokens/s, peak memory, losses",
        machine=where,
        settings={
            "model": MODEL if device.type == "cpu" else "random weights",
            "lora": asdict(LORA),
            "learning_rates": {name: case.learning_rate for name, case in cases.items()},
            "max_grad_norm": MAX_GRAD_NORM,
            "seed": SEED,
            "warmup": WARMUP,
            "product_flops": {str(dtype): value for dtype, value in flops.items()},
        },
        rows=[_row(name, contender, result) for name, result in measured.items() for contender in result.trained],
        raw={name: asdict(result) for name, result in measured.items()},
        plot=partial(plot, measured),
        notes=[
            f"{name}: without {contender}: {reason}"
            for name, result in measured.items()
            for contender, reason in result.left_out.items()
        ],
        size=figure_size(len(cases)),
    )


def measure(
    case: Case,
    rounds: int,
    contenders: dict[str, Callable[[Task], Contender]],
    flops: float,
    device: torch.device,
) -> Measured:
    """Let the contenders train on a case, a step each in turns; `flops` is the speed of its floor."""
    task = make_task(case, WARMUP + rounds, device)
    runners = {name: Runner(build, task, _held_out, device) for name, build in contenders.items()}
    left_out: dict[str, str] = {}
    try:
        for name, runner in with_progress(runners.items(), len(runners), f"{case}, starting", "contenders"):
            try:
                runner.ready()
                for _ in range(WARMUP):
                    runner.turn()
            except InputError as error:
                if name not in OPTIONAL:
                    raise InputError(f"{name}: {error}") from None
                left_out[name] = str(error)
        taking_part = {name: runner for name, runner in runners.items() if name not in left_out}

        def step(name: str, _: int) -> None:
            try:
                runners[name].turn()
            except InputError as error:
                raise InputError(f"{name}: {error}") from None

        # A turn ends when its process has synchronized with the GPU; this one has no work there.
        turns = {name: partial(step, name) for name in taking_part}
        seconds = take_turns(turns, rounds, torch.device("cpu"), warmup=0, progress=str(case))
        finishing = with_progress(taking_part.items(), len(taking_part), f"{case}, finishing", "contenders")
        trained = {name: runner.finish() for name, runner in finishing}
    finally:
        for runner in runners.values():
            runner.close()
    counted = task.steps()[WARMUP:]
    config = base_weights(case, device).config
    return Measured(
        tokens=[sum(len(example.input_ids) for example in examples) for examples in counted],
        least_seconds=[least_flops(config, examples) / flops for examples in counted],
        seconds=seconds,
        trained=trained,
        left_out=left_out,
    )


def _contenders(case: Case, device: torch.device) -> dict[str, Callable[[Task], Contender]]:
    return CONTENDERS[device.type] | {name: ALSO[name] for name in case.also}


def _held_out(model: nn.Module, task: Task) -> float | None:
    return held_out_loss(model, task.held_out, PAD) if task.held_out else None


def _row(case: str, name: str, measured: Measured) -> dict[str, str]:
    ratio, trained = measured.ratio(name), measured.trained[name]
    return {
        "configuration": case,
        "contender": name,
        "tokens/s": f"{Spread.of(measured.tokens_per_s(name)).median:.0f}",
        "times PEFT's": f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        "of floor": f"{measured.share_of_floor(name):.0%}",
        "peak, MiB": f"{trained.peak_mb:.0f} ({trained.peak_mb / measured.trained[PEER].peak_mb:.0%})",
        "loss, off PEFT's": "" if name == PEER else f"{measured.loss_difference(name):.0e}",
        "held-out": "" if trained.held_out_loss is None else f"{trained.held_out_loss:.4f}",
    }
