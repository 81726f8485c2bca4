"""train: one training step of the demo (SmolLM2-135M, r=16 on all linear layers, 8 rows) against transformers + PEFT.

Every contender starts from the same base and the same adapter weights and takes the same steps on the same rows, so
that their losses lie on each other. Tokens are real ones, padding not counted. transformers and PEFT are used as their
documentation has it (bfloat16 base, SDPA attention, float32 adapters), without the Trainer's own overhead.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Spread, in_own_process, machine, peak_memory_mb, reset_peak_memory, take_turns
from benchmarks.output import Result
from minilora.adapters import adapter_parameters, add_adapter
from minilora.bfcl import load_bfcl
from minilora.checkpoint import load
from minilora.data import Batch, Example, batches, collate, encode_rows
from minilora.errors import InputError
from minilora.fetch import model_file
from minilora.lora import LoRAConfig
from minilora.loss import label_tokens, summed_loss
from minilora.tokenizer import Tokenizer

MODEL = "smollm2-135m-instruct"
BATCH_SIZE, MAX_LENGTH, LEARNING_RATE, MAX_GRAD_NORM, SEED = 8, 180, 2e-3, 1.0, 0
LORA = LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear")
PEER = "transformers + PEFT, LoRA"
WARMUP = 2
MEMORY_STEPS = 3  # on the largest batches: AdamW's moments exist from the second on

Measured = dict[str, list[float]]  # of each contender, in each round
Loss = Callable[[Batch, int], Tensor]  # of a batch and the number of its labelled tokens, their mean


@dataclass(frozen=True)
class Trainer:
    """A contender: a model with one adapter, and how it computes its loss."""

    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, model: nn.Module, loss: Loss) -> "Trainer":
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(model.train(), loss, torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0))

    def step(self, examples: Sequence[Example], pad_token_id: int) -> float:
        """One step of AdamW on the examples; returns their loss."""
        loss = self.loss(collate(examples, pad_token_id), label_tokens(examples))
        loss.backward()
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


# --- contenders -------------------------------------------------------------------------------------------------------


def minilora(device: torch.device, quantize: Any = None) -> Trainer:
    model, _ = load(MODEL, quantize=quantize, dtype=torch.bfloat16, device=str(device))
    torch.manual_seed(SEED)
    add_adapter(model, LORA)
    return Trainer.of(model, lambda batch, n: summed_loss(model, batch) / n)


def peft(device: torch.device, quantize: bool = False) -> Trainer:
    """The same base weights, read from the GGUF file, in a transformers model; the same adapter weights in PEFT's."""
    try:
        import peft
        import transformers
    except ImportError as error:
        raise InputError(f"this benchmark needs {error.name}: pip install transformers peft bitsandbytes") from None
    ours, _ = load(MODEL, quantize=None, dtype=torch.bfloat16)
    config = transformers.AutoConfig.for_model(**ours.config.to_hf())
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    base.load_state_dict(ours.state_dict())
    torch.manual_seed(SEED)
    add_adapter(ours, LORA)
    if quantize:
        base = _with_bitsandbytes(base)
    config = peft.LoraConfig(r=LORA.r, lora_alpha=LORA.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).to(device)
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in adapter_parameters(ours).items():
            theirs[f"base_model.model.{name}.default.weight"].copy_(parameter)

    def loss(batch: Batch, n: int) -> Tensor:
        batch = Batch(*(tensor.to(device) for tensor in batch))
        result: Tensor = model(**batch._asdict(), use_cache=False).loss
        return result

    return Trainer.of(model, loss)


def _with_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace the blocks' linear layers as transformers' BitsAndBytesConfig(load_in_4bit, nf4, double quant) does."""
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        raise InputError("this benchmark needs bitsandbytes: pip install transformers peft bitsandbytes") from None
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and path != "lm_head":
            quantized = Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, True, "nf4"
            )
            quantized.load_state_dict(linear.state_dict())
            model.set_submodule(path, quantized.requires_grad_(False))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model


CONTENDERS: dict[str, Callable[[torch.device], Trainer]] = {
    PEER: peft,
    "minilora, LoRA": minilora,
    "transformers + PEFT + bitsandbytes, QLoRA": partial(peft, quantize=True),
    "minilora, QLoRA": partial(minilora, quantize="nf4"),
}


# --- the benchmark ----------------------------------------------------------------------------------------------------


def demo_batches() -> tuple[list[list[Example]], Tokenizer]:
    """The demo's training rows, in batches as the demo makes them."""
    tokenizer = Tokenizer.from_gguf(model_file(MODEL))
    examples = encode_rows(load_bfcl()["train"], tokenizer, MAX_LENGTH).examples
    order = batches(examples, BATCH_SIZE, SEED, group_by_length=True)
    return [[examples[i] for i in indices] for indices in order], tokenizer


def run(rounds: int | None, device: torch.device) -> Result:
    """Time all contenders in turns, then measure each one's memory in a process of its own."""
    from rich.progress import track

    rounds = rounds or 20
    where = machine(device)
    steps, tokenizer = demo_batches()
    seconds, losses = take_steps(steps[: WARMUP + rounds], tokenizer.pad_token_id, device)
    tokens = [sum(len(example.input_ids) for example in examples) for examples in steps[WARMUP : WARMUP + rounds]]
    tokens_per_s = {name: [n / s for n, s in zip(tokens, values, strict=True)] for name, values in seconds.items()}
    memory = {
        name: json.loads(in_own_process("benchmarks.train_step", name, str(device)))
        for name in track(CONTENDERS, "memory, one process each")
    }
    return Result(
        benchmark="train",
        title="One training step of the demo: SmolLM2-135M, r=16, 8 rows",
        machine=where,
        settings={
            "model": MODEL,
            "lora": asdict(LORA),
            "batch_size": BATCH_SIZE,
            "max_length": MAX_LENGTH,
            "learning_rate": LEARNING_RATE,
            "rounds": rounds,
            "warmup": WARMUP,
        },
        rows=[_row(name, tokens_per_s, losses[name], memory[name]) for name in CONTENDERS],
        raw={"tokens": tokens, "seconds": seconds, "losses": losses, "memory_mb": memory},
        plot=partial(_plot, tokens_per_s, losses, memory),
    )


def take_steps(steps: list[list[Example]], pad_token_id: int, device: torch.device) -> tuple[Measured, Measured]:
    """Seconds (without the warm-up) and losses of every contender, each training on all the steps."""
    from rich.progress import Progress

    trainers = {name: build(device) for name, build in CONTENDERS.items()}
    losses: Measured = {name: [] for name in trainers}
    with Progress() as progress:
        bar = progress.add_task("steps, in turns", total=len(steps) * len(trainers))

        def step(name: str, round: int) -> None:
            losses[name].append(trainers[name].step(steps[round], pad_token_id))
            progress.advance(bar)

        contenders = {name: partial(step, name) for name in trainers}
        return take_turns(contenders, len(steps) - WARMUP, device, WARMUP), losses


def _row(name: str, tokens_per_s: Measured, losses: list[float], memory: dict[str, float]) -> dict[str, str]:
    speed = Spread.of(tokens_per_s[name])
    ratio = Spread.of([ours / peer for ours, peer in zip(tokens_per_s[name], tokens_per_s[PEER], strict=True)])
    last = losses[-5:]
    return {
        "contender": name,
        "tokens/s": f"{speed.median:.0f} ({speed.low:.0f} to {speed.high:.0f})",
        "times PEFT's": f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        "peak memory, MiB": f"{memory['peak_mb']:.0f}",
        "loss, last 5 steps": f"{sum(last) / len(last):.3f}",
    }


def _plot(
    tokens_per_s: dict[str, list[float]],
    losses: dict[str, list[float]],
    memory: dict[str, dict[str, float]],
    figure: Any,
) -> None:
    speed_axes, memory_axes, loss_axes = figure.subplots(1, 3)
    for i, name in enumerate(CONTENDERS):
        speed = Spread.of(tokens_per_s[name])
        whisker = [[speed.median - speed.low], [speed.high - speed.median]]
        speed_axes.bar(i, speed.median, yerr=whisker, capsize=4, color=f"C{i}")
        memory_axes.bar(i, memory[name]["peak_mb"], color=f"C{i}")
        loss_axes.plot(range(1, len(losses[name]) + 1), losses[name], color=f"C{i}", label=name, alpha=0.8)
    for axes, title in ((speed_axes, "real tokens/s, median and quartiles"), (memory_axes, "peak memory, MiB")):
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
    loss_axes.set_title("loss of the same steps", fontsize=9)
    loss_axes.set_xlabel("step")
    figure.legend(*loss_axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)


def measure_memory(name: str, device: torch.device) -> dict[str, float]:
    """Peak of one contender's steps on the largest batches, in this process; loading is over by then."""
    steps, tokenizer = demo_batches()
    largest = sorted(steps, key=lambda examples: max(len(example.input_ids) for example in examples))[-MEMORY_STEPS:]
    trainer = CONTENDERS[name](device)
    reset_peak_memory(device)
    loaded = peak_memory_mb(device)
    for examples in largest:
        trainer.step(examples, tokenizer.pad_token_id)
    return {"loaded_mb": loaded, "peak_mb": peak_memory_mb(device)}


if __name__ == "__main__":
    print(json.dumps(measure_memory(sys.argv[1], torch.device(sys.argv[2]))))
