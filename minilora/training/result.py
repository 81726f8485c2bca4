"""How a run ends: with a result, or diverged."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from minilora.data import Example, Skipped
from minilora.training.checkpoint import Progress
from minilora.training.config import TrainConfig
from minilora.training.log import Record, read_log


@dataclass
class TrainResult:
    """What came out of a run; the model itself carries the trained adapter."""

    adapter_dir: Path
    """The final adapter, in PEFT's format."""
    checkpoint: Path
    """The last checkpoint."""
    steps: int
    """Optimizer steps, those before a resume included."""
    tokens: int
    """Tokens seen in training; padding does not count."""
    seconds: float
    """Time of the training steps, those before a resume included."""
    loss: float
    """Mean training loss of the last tenth of the steps, in nats a labelled token."""
    eval_loss: float | None
    """Held-out loss of the parameters that the model has now; None without held-out rows."""
    best_step: int | None
    """The step of the lowest held-out loss; its checkpoint is kept."""
    stopped_early: bool
    """Whether `early_stopping_patience` ended the run."""
    history: list[Record] = field(repr=False)
    """The records of output_dir/log.jsonl."""
    skipped: list[Skipped] = field(repr=False)
    """Rows that were not used, and why."""


def result_of(
    config: TrainConfig, checkpoint: Path, progress: Progress, stopped_early: bool, skipped: list[Skipped]
) -> TrainResult:
    output_dir = Path(config.output_dir)
    history = read_log(output_dir / "log.jsonl")
    losses = [record["loss"] for record in history if "loss" in record]
    eval_losses = [record["eval_loss"] for record in history if "eval_loss" in record]
    last = losses[-max(1, len(losses) // 10) :]
    best_is_restored = config.early_stopping_patience is not None
    return TrainResult(
        adapter_dir=output_dir / "adapter",
        checkpoint=checkpoint,
        steps=progress.step,
        tokens=progress.tokens,
        seconds=progress.seconds,
        loss=sum(last) / len(last) if last else math.nan,
        eval_loss=progress.best_eval_loss if best_is_restored else (eval_losses or [None])[-1],
        best_step=progress.best_step,
        stopped_early=stopped_early,
        history=history,
        skipped=skipped,
    )


class DivergedError(RuntimeError):
    """Loss or gradient is no longer finite: names the step, the rows and the last good checkpoint."""


def diverged(
    step: int, pass_losses: list[float], grad_norm: float, passes: list[list[Example]], checkpoint: Path | None
) -> str:
    """The message of a `DivergedError`."""
    guilty = [rows for loss, rows in zip(pass_losses, passes, strict=True) if not math.isfinite(loss)]
    sources = [example.source or "a row without a source" for rows in guilty or passes for example in rows]
    what = f"loss is {sum(pass_losses)}" if guilty else f"gradient norm is {grad_norm}"
    saved = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved before"
    advice = "A lower learning_rate, a smaller max_grad_norm or a look at these rows may help."
    if step == 1:  # nothing has been learned yet
        advice = "Look at these rows, at the model's weights, or whether its dtype overflows."
    return (
        f"step {step}: the {what} on the rows {', '.join(sources)}; the parameters were not updated with it;"
        f" {saved}. {advice}"
    )
