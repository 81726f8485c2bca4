"""profile: where the time of a training step of SmolLM2-135M goes, operation by operation, beside the floor.

The demo's rows in minilora's own loop, LoRA and QLoRA, in the dtype that "auto" comes to. The time is each operator's
own, as torch.profiler takes it on the thread that calls it; Python and the dispatch of operators are what is left of
the step. The floor is what the products have to take at the speed of a large one (training_cases.least_work).
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from benchmarks.measure import machine
from benchmarks.nf4_cases import measured_speeds
from benchmarks.output import Result
from benchmarks.training_cases import LORA, MAX_GRAD_NORM, MODEL, Case, base_weights, least_work, make_task
from benchmarks.training_contenders import minilora as contender
from minilora.auto_dtype import auto_dtype
from minilora.data.batches import pack
from minilora.data.examples import Example
from minilora.errors import InputError
from minilora.nf4.kept_weights import keeping_weights
from minilora.progress import with_progress
from minilora.training.config import TrainConfig
from minilora.training.loss import label_tokens, summed_loss
from minilora.training.optimizer import make_optimizer

ROUNDS = 4
BASE, LOW_RANK, HEAD = "products with frozen weights", "products with A and B", "head"
ATTENTION, ELEMENTWISE, COPIES = "attention's products and softmax", "elementwise", "copies, casts, concatenation"
DEQUANTIZATION, OPTIMIZER, REST = "dequantization", "AdamW and clipping", "Python, dispatch, the rest"
OF_OPERATOR = {
    "bmm": ATTENTION, "baddbmm": ATTENTION, "_softmax": ATTENTION, "_softmax_backward_data": ATTENTION,
    "copy_": COPIES, "cat": COPIES, "fill_": COPIES, "clone": COPIES,
    "gather": DEQUANTIZATION, "index_select": DEQUANTIZATION,
    "_fused_adamw_": OPTIMIZER, "_foreach_norm": OPTIMIZER, "_foreach_mul_": OPTIMIZER,
    "linalg_vector_norm": OPTIMIZER,
    "_log_softmax": HEAD, "exp_": HEAD,
} | dict.fromkeys(
    ("mul", "mul_", "add", "add_", "addcmul", "addcmul_", "sub", "silu", "silu_backward", "pow", "rsqrt", "sum", "mean",
     "neg", "div", "cos", "sin"), ELEMENTWISE
)  # fmt: skip


def run(rounds: int | None, device: torch.device) -> Result:
    """Profile so many steps of LoRA and of QLoRA."""
    if device.type != "cpu":
        raise InputError(f"the benchmark 'profile' is of a CPU's operators, not of {device.type}: use torch.profiler")
    dtype = auto_dtype(device).dtype
    where, flops = machine(device), measured_speeds(device).flops[dtype]
    cases = [Case("8 demo rows", None, 8, quantize, dtype) for quantize in (False, True)]
    profiles = {str(case): _profile(case, rounds or ROUNDS, device, flops) for case in cases}
    return Result(
        benchmark="profile",
        title="A training step by operation, ms",
        machine=where,
        settings={"model": MODEL, "dtype": str(dtype), "product_flops": flops},
        rows=[
            {"configuration": case, "operation": name, "ms": f"{ms:.0f}", "share": f"{ms / sum(times.values()):.0%}",
             "floor, ms": f"{floor[name]:.0f}" if name in floor else ""}
            for case, (times, floor) in profiles.items() for name, ms in times.most_common()
        ],
        raw={case: {"ms": dict(times), "floor_ms": floor} for case, (times, floor) in profiles.items()},
        plot=partial(_plot, profiles),
        size=(11, 2 + 2.2 * len(profiles)),
    )  # fmt: skip


def _profile(case: Case, rounds: int, device: torch.device, flops: float) -> tuple[Counter[str], dict[str, float]]:
    """Milliseconds a step of each kind of operation, and the least that the products take."""
    from torch.profiler import ProfilerActivity, profile

    task = make_task(case, rounds + 1, device)
    model = contender(task).model
    optimizer = make_optimizer(model, "default", TrainConfig())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(examples: list[Example]) -> None:
        (summed_loss(model, pack(examples)) / label_tokens(examples)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    first, *counted = task.steps()
    config = base_weights(case, device).config
    with keeping_weights():
        step(first)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            for examples in with_progress(counted, len(counted), f"profile, {case}", "steps"):
                step(examples)
    times = _by_kind(recorded.key_averages(group_by_input_shape=True), config.vocab_size, 1e3 * rounds)
    work: Counter[str] = Counter()
    for examples in counted:
        base, low_rank, head = least_work(config, examples)
        work.update({BASE: base, LOW_RANK: low_rank, HEAD: head})
    return times, {name: 1e3 * operations / flops / rounds for name, operations in work.items()}


def _by_kind(events: Iterable[Any], vocab_size: int, divide_by: float) -> Counter[str]:
    """The operators' own times, a kind each; microseconds divided by `divide_by`."""
    times: Counter[str] = Counter()
    for event in events:
        name = event.key.removeprefix("aten::")
        kind = OF_OPERATOR.get(name, REST)
        if name in ("mm", "addmm", "addmm_"):
            sizes = {size for shape in event.input_shapes if len(shape) == 2 for size in shape}
            ranks = {LORA.r, 2 * LORA.r, 3 * LORA.r}  # of layers that share an input, one above the other
            kind = HEAD if vocab_size in sizes else LOW_RANK if sizes & ranks else BASE
        times[kind] += event.self_cpu_time_total / divide_by
    return times


def _plot(profiles: dict[str, tuple[Counter[str], dict[str, float]]], figure: Any) -> None:
    """A row of bars for each case: what it took, and inside it the floor."""
    panels: Callable[..., Any] = figure.subplots
    for axes, (case, (times, floor)) in zip(
        panels(len(profiles), 1, squeeze=False)[:, 0], profiles.items(), strict=True
    ):
        names = [name for name, _ in times.most_common()]
        axes.barh(names, [times[name] for name in names], color="C0", label="measured")
        axes.barh(names, [floor.get(name, 0) for name in names], height=0.35, color="0.8", label="floor")
        axes.invert_yaxis()
        axes.set_title(case, fontsize=9)
        axes.set_xlabel("ms a step")
        axes.legend(fontsize=8)
