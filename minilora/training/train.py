"""The training loop, in one function: rows in; a trained adapter, checkpoints and a log out."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from minilora.adapters import (
    adapter_class,
    adapters_named,
    refuse_merged,
    refuse_row_names,
    refuse_switched_off,
    set_adapter,
    summed_regularization,
)
from minilora.data import Example, Skipped, batches, collate, pack
from minilora.errors import InputError
from minilora.models import can_pack
from minilora.progress import silent
from minilora.text import Tokenizer
from minilora.training.checkpoint import (
    Progress,
    checkpoint_to_resume,
    read_checkpoint,
    restore,
    restore_parameters,
    save_adapter_atomically,
    save_checkpoint,
)
from minilora.training.config import TrainConfig
from minilora.training.fingerprint import fingerprint
from minilora.training.interrupt import StopRequest, TrainingInterrupted
from minilora.training.log import Record, computes_with, memory_mb, open_log, read_log
from minilora.training.loss import held_out_loss, label_tokens, summed_loss
from minilora.training.loss_scale import FIRST_SCALE, gradients_are_finite, needs_loss_scale, unscale_
from minilora.training.mode import check_training_mode, training_mode
from minilora.training.optimizer import check_optimizer, make_masters, make_optimizer, parameters_to_train
from minilora.training.random_states import seed_everything
from minilora.training.rows import TrainingRows, refuse_unreadable, usable_examples
from minilora.training.schedule import learning_rate_factor

__all__ = ["DivergedError", "TrainConfig", "TrainResult", "TrainingInterrupted", "train"]


@dataclass
class TrainResult:
    """What came out of a run; the model itself carries the trained adapter."""

    adapter_dir: Path  # the final adapter, in PEFT's format
    checkpoint: Path  # the last checkpoint
    steps: int
    tokens: int  # seen in training; padding does not count
    seconds: float  # of training steps, those before a resume included
    loss: float  # mean training loss of the last tenth of the steps
    eval_loss: float | None  # held-out, of the parameters that the model has now
    best_step: int | None  # of the lowest held-out loss; its checkpoint is kept
    stopped_early: bool
    history: list[Record] = field(repr=False)  # output_dir/log.jsonl
    skipped: list[Skipped] = field(repr=False)  # rows that were not used, and why


class DivergedError(RuntimeError):
    """Loss or gradient is no longer finite: names the step, the rows and the last good checkpoint."""


def train(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: TrainingRows,
    config: TrainConfig = TrainConfig(),  # noqa: B008 - it is frozen
    eval_rows: TrainingRows | None = None,
    adapter: str = "default",
) -> TrainResult:
    """Train one adapter of the model, made the only active one, with AdamW on the rows' labelled tokens.

    `rows` and `eval_rows` are a path, dicts, `Row`s or `Example`s. The loss of a step is the sum of the cross-entropy
    over the step's labelled tokens divided by their number, however the step is split into passes.
    Raises InputError for unusable rows or settings, DivergedError for a loss or gradient that is not finite,
    TrainingInterrupted on Ctrl-C.
    """
    # All that can be refused is refused before anything is changed.
    output_dir, checkpoint = Path(config.output_dir), checkpoint_to_resume(config)
    eval_examples: list[Example] = []
    with nullcontext() if config.progress else silent():
        examples, skipped = usable_examples(rows, tokenizer, config.max_length)
        if eval_rows is not None:
            eval_examples, eval_skipped = usable_examples(eval_rows, tokenizer, config.max_length, "held-out")
            skipped = skipped + eval_skipped
        elif config.eval_every:
            raise InputError("eval_every needs eval_rows")

    adapters = adapters_named(model, adapter)
    parameters = parameters_to_train(model, adapter)
    refuse_row_names(model)
    refuse_merged(model)
    refuse_switched_off(model, "training")
    refuse_unreadable(model, examples + eval_examples)
    check_training_mode(model, config)
    check_optimizer(model, adapter, config)
    variant = adapter_class(next(iter(adapters.values())).config)
    packing = config.packing and can_pack(model)
    steps_per_epoch = math.ceil(len(examples) / (config.batch_size * config.gradient_accumulation_steps))
    total_steps = config.max_steps or math.ceil(config.epochs * steps_per_epoch)
    if checkpoint is None:
        for each in adapters.values():
            each.check_before_training(adapter, total_steps)
    # packing as it is for this model: the order of the rows hangs on it; dtype: "auto" may differ on another machine
    settings = config.decisive() | {"packing": packing, "dtype": computes_with(model)["dtype"]}
    run = fingerprint(model, adapter, parameters, settings, examples, eval_examples)
    saved = read_checkpoint(checkpoint, run) if checkpoint else None
    progress = saved.progress if saved else Progress()
    stopped_early = _out_of_patience(progress, config)

    with (
        training_mode(model, config),
        open_log(config, progress.step + 1, total_steps, model) as write,
        StopRequest() as stop,
    ):
        set_adapter(model, adapter)
        make_masters(parameters.values())
        optimizer = make_optimizer(model, adapter, config)
        seed_everything(config.seed)
        if saved:
            restore(saved, model, adapter, parameters, optimizer)
        elif needs_loss_scale(model):
            progress.loss_scale = FIRST_SCALE

        first_step, last_step = progress.step + 1, progress.step if stopped_early else total_steps
        for step, step_examples in _steps(examples, config, packing, steps_per_epoch, first_step, last_step):
            started = time.perf_counter()

            # L = 1/n Σ −log p(label), n over the whole step: 8 passes of 1 row equal 1 pass of 8 rows
            n = label_tokens(step_examples)
            passes = _split(step_examples, config.batch_size)
            while True:
                losses = []
                for pass_examples in passes:
                    batch = pack(pass_examples) if packing else collate(pass_examples, tokenizer.pad_token_id)
                    loss = summed_loss(model, batch) / n
                    if loss.requires_grad:
                        (progress.loss_scale * loss).backward()
                    losses.append(loss.detach())
                unscale_(parameters.values(), progress.loss_scale)
                fits = progress.loss_scale == 1 or gradients_are_finite(parameters.values())
                if fits or not torch.stack(losses).isfinite().all():
                    break
                progress.lower_loss_scale()  # and once more
                optimizer.zero_grad()
            if all(parameter.grad is None for parameter in parameters.values()):
                raise InputError(f"the loss does not depend on adapter {adapter!r}: its layers take no part in it")
            penalty = summed_regularization(adapters.values())
            if isinstance(penalty, torch.Tensor):
                penalty.backward()
            pass_losses = torch.stack(losses).tolist()
            grad_norm = clip_grad_norm_(parameters.values(), config.max_grad_norm or math.inf).item()
            if not math.isfinite(sum(pass_losses)) or not math.isfinite(grad_norm):
                optimizer.zero_grad()  # the parameters stay those of the step before
                raise DivergedError(_divergence(step, pass_losses, grad_norm, passes, checkpoint))

            factor = learning_rate_factor(config, step - 1, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            optimizer.step()
            variant.after_step(adapters, step)
            optimizer.zero_grad()

            seconds = time.perf_counter() - started
            tokens = sum(len(example.input_ids) for example in step_examples)
            progress.add_step(tokens, seconds)
            write(
                {
                    "step": step,
                    "epoch": step / steps_per_epoch,
                    "loss": sum(pass_losses),
                    "learning_rate": factor * config.learning_rate,
                    "grad_norm": grad_norm,
                    "tokens": tokens,
                    "label_tokens": n,
                    "tokens_per_s": tokens / seconds,
                    "seconds": progress.seconds,
                    **memory_mb(next(iter(parameters.values())).device),
                }
            )

            is_best = False
            if eval_examples and _due(config.eval_every, step, total_steps):
                started = time.perf_counter()
                eval_loss = held_out_loss(model, eval_examples, tokenizer.pad_token_id, config.batch_size, packing)
                is_best = progress.add_evaluation(eval_loss)
                seconds = time.perf_counter() - started
                write({"step": step, "epoch": step / steps_per_epoch, "eval_loss": eval_loss, "eval_seconds": seconds})

            stopped_early = _out_of_patience(progress, config)
            if is_best or stopped_early or stop.made or _due(config.save_every, step, total_steps):
                checkpoint = save_checkpoint(
                    output_dir, model, adapter, parameters, optimizer, progress, run, config.keep_last
                )
            if stop.made:
                raise TrainingInterrupted(cast(Path, checkpoint), step, total_steps)
            if stopped_early:
                break

    if config.early_stopping_patience and progress.best_step is not None:
        restore_parameters(output_dir, progress.best_step, parameters)
    save_adapter_atomically(output_dir / "adapter", model, adapter)
    return _result(config, cast(Path, checkpoint), progress, stopped_early, skipped)


# --- the parts of the loop --------------------------------------------------------------------------------------------


def _steps(
    examples: list[Example], config: TrainConfig, packing: bool, steps_per_epoch: int, first_step: int, last_step: int
) -> Iterator[tuple[int, list[Example]]]:
    """Each step's number, counted from 1, and its rows; the order depends on seed and epoch only, so it resumes."""
    rows_per_step = config.batch_size * config.gradient_accumulation_steps
    order: list[list[int]] = []
    for step in range(first_step, last_step + 1):
        epoch, index = divmod(step - 1, steps_per_epoch)
        if index == 0 or step == first_step:
            order = batches(examples, rows_per_step, config.seed, epoch, config.group_by_length and not packing)
        yield step, [examples[i] for i in order[index]]


def _split(examples: list[Example], size: int) -> list[list[Example]]:
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def _due(every: int | None, step: int, total_steps: int) -> bool:
    return step == total_steps or (every is not None and step % every == 0)


def _out_of_patience(progress: Progress, config: TrainConfig) -> bool:
    patience = config.early_stopping_patience
    return patience is not None and progress.evaluations_since_best >= patience


def _divergence(
    step: int, pass_losses: list[float], grad_norm: float, passes: list[list[Example]], checkpoint: Path | None
) -> str:
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


# --- after the loop ---------------------------------------------------------------------------------------------------


def _result(
    config: TrainConfig, checkpoint: Path, progress: Progress, stopped_early: bool, skipped: list[Skipped]
) -> TrainResult:
    output_dir = Path(config.output_dir)
    history = read_log(output_dir / "log.jsonl")
    losses = [record["loss"] for record in history if "loss" in record]
    eval_losses = [record["eval_loss"] for record in history if "eval_loss" in record]
    last = losses[-max(1, len(losses) // 10) :]
    restored = config.early_stopping_patience is not None
    return TrainResult(
        adapter_dir=output_dir / "adapter",
        checkpoint=checkpoint,
        steps=progress.step,
        tokens=progress.tokens,
        seconds=progress.seconds,
        loss=sum(last) / len(last) if last else math.nan,
        eval_loss=progress.best_eval_loss if restored else (eval_losses or [None])[-1],
        best_step=progress.best_step,
        stopped_early=stopped_early,
        history=history,
        skipped=skipped,
    )
