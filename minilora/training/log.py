"""What a training run tells: every record goes to each of the sinks that the run has.

A record is a flat dict. The log's first tells what the run computes with: device, dtype and why, threads, torch; one
more comes with every resume. A training step's has step, epoch, loss, learning_rate, grad_norm, tokens, label_tokens,
tokens_per_s, seconds, rss_mb (and gpu_mb); an evaluation's has step, epoch, eval_loss, eval_seconds, seconds.
`tokens` are real ones: padding does not count.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from minilora.auto_dtype import auto_dtype
from minilora.devices import peak_memory
from minilora.errors import InputError
from minilora.nf4 import NF4Linear, weights_that_fit
from minilora.progress import Stage, silent
from minilora.training.config import TrainConfig

Record = dict[str, Any]


class Sink(Protocol):
    """Somewhere a record goes."""

    def write(self, record: Record) -> None: ...
    def close(self) -> None: ...


@contextmanager
def open_log(
    config: TrainConfig, first_step: int, total_steps: int, model: nn.Module
) -> Iterator[Callable[[Record], None]]:
    """A function that writes a record to every sink; what the model computes with is in log.jsonl already.

    Raises InputError if one's package is missing, or output_dir cannot be written to.
    """
    folder, about = Path(config.output_dir), computes_with(model)
    sinks: list[Sink] = []

    with ExitStack() as stack:  # what is open when another sink fails is closed

        def add(sink: Sink) -> None:
            sinks.append(stack.enter_context(closing(sink)))

        try:
            folder.mkdir(parents=True, exist_ok=True)
            if config.tensorboard:
                add(TensorBoard(folder / "tensorboard", first_step))
            if config.wandb_project:
                add(WeightsAndBiases(config.wandb_project, folder, asdict(config)))
            add(JsonLines(folder / "log.jsonl", first_step))
            sinks[-1].write({"step": first_step - 1, **about})
        except OSError as error:
            raise InputError(f"output_dir {folder} cannot be written to: {error.strerror or error}") from None
        if not config.progress:
            stack.enter_context(silent())
        elif about["kept_weights"]:
            print(
                f"{about['kept_weights']} of {about['nf4_weights']} NF4 weights stay dequantized between steps, in "
                f"{about['kept_weights_mb']:.0f} MiB: keep_weights=False trains slower without them",
                file=sys.stderr,
                flush=True,
            )
        if config.progress:
            add(ProgressSink(first_step, total_steps))

        def write(record: Record) -> None:
            for sink in sinks:
                sink.write(record)

        yield write


def computes_with(model: nn.Module) -> Record:
    """The device; the dtype of the frozen weights beside those in NF4, and why; how many of these stay dequantized."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    weight = next((p for p in weights if not p.requires_grad), weights[0])
    auto = auto_dtype(weight.device)
    why = auto.reason if weight.dtype == auto.dtype else f'chosen; dtype="auto" would be {auto}'
    in_nf4 = [(m.quantized(), m.compute_dtype or weight.dtype) for m in model.modules() if isinstance(m, NF4Linear)]
    kept, kept_bytes = weights_that_fit(in_nf4)
    return {
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "dtype_reason": why,
        "nf4_weights": len(in_nf4),
        "kept_weights": kept,
        "kept_weights_mb": kept_bytes / 2**20,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


class JsonLines:
    """One JSON object a line; a resumed run first drops the records of the steps that it repeats."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [record for record in read_log(path) if record["step"] < first_step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        temporary.replace(path)
        self.path, self.file = path, path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()  # a run that is killed keeps its log, and `tail -f` follows it
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; checkpoints stay as they were") from None

    def close(self) -> None:
        with suppress(OSError):  # of what `write` could not write
            self.file.close()


def read_log(path: Path) -> list[Record]:
    """The records of a log.jsonl, none if there is no such file; a last line cut short by a kill is left out.

    Raises InputError naming a line that is no record.
    """
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # the last newline ends the last line
    for number, line in enumerate(lines, start=1):
        record = None
        with suppress(ValueError):
            record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise InputError(f"{path}:{number} is no record of a training log: remove the line")
        records.append(record)
    return records


class TensorBoard:
    """Scalars train/* and eval/* for TensorBoard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("tensorboard=True needs the package: pip install tensorboard") from None
        # purge_step hides what an earlier run logged for the steps that this one repeats
        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """The same scalars for Weights & Biases."""

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise InputError("wandb_project needs the package: pip install wandb") from None
        self.run = wandb.init(project=project, dir=str(folder), config=dict(settings))

    def write(self, record: Record) -> None:
        self.run.log(_scalars(record), step=record["step"])

    def close(self) -> None:
        self.run.finish()


def _scalars(record: Record) -> dict[str, float]:
    group = "eval" if "eval_loss" in record else "train"
    return {f"{group}/{name.removeprefix('eval_')}": value for name, value in record.items() if name != "step"}


class ProgressSink:
    """Smoothed loss, learning rate, tokens/s, memory and time left, as minilora/progress.py shows them."""

    def __init__(self, first_step: int, total_steps: int) -> None:
        self.stage = Stage("training", total_steps, "steps", done=first_step - 1, main=True)
        self.smooth = Smoothed()

    def write(self, record: Record) -> None:
        if "eval_loss" in record:
            print(f"step {record['step']} · held-out loss {record['eval_loss']:.4f}", file=sys.stderr, flush=True)
        else:
            self.stage.advance(1, f"step {record['step']}/{self.stage.total} · {self.smooth.status(record)}")

    def close(self) -> None:
        self.stage.close(finished=self.stage.done == self.stage.total)


class Smoothed:
    """Exponential moving averages of loss and tokens/s, unbiased from the first step (Adam's correction)."""

    def __init__(self) -> None:
        self.means = [0.0] * 4

    def status(self, record: Record) -> str:
        """Take a training step's record in; what to show of it."""
        tokens = record["tokens"]
        values = 1.0, record["loss"], tokens, tokens / record["tokens_per_s"]
        self.means = [0.9 * mean + 0.1 * value for mean, value in zip(self.means, values, strict=True)]
        weight, loss, tokens, seconds = self.means
        memory = (record["gpu_mb"] if "gpu_mb" in record else record["rss_mb"]) / 1024
        return (
            f"loss {loss / weight:.4f} · lr {record['learning_rate']:.1e}"
            f" · {tokens / seconds:,.0f} tokens/s · {memory:.1f} GB"
        )


def memory_mb(device: torch.device) -> dict[str, float]:
    """Resident memory of this process in MiB, and the peak allocated on the device if it is a GPU."""
    memory = {"rss_mb": round(_resident_bytes() / 2**20, 1)}
    if (on_gpu := peak_memory(device)) is not None:
        memory["gpu_mb"] = round(on_gpu / 2**20, 1)
    return memory


def _resident_bytes() -> int:
    if (statm := Path("/proc/self/statm")).exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the peak, in bytes on macOS, which has no /proc
