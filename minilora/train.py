"""The training loop, in one function: rows in; a trained adapter, checkpoints and a log out."""

import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from minilora.adapters import (
    adapter_parameters,
    adapters_named,
    after_step,
    regularization,
    set_adapter,
    trainable_parameters,
)
from minilora.data import Example, Row, Skipped, as_rows, batches, collate, encode_rows, load_rows
from minilora.errors import InputError
from minilora.lora import LoRA
from minilora.loss import held_out_loss, label_tokens, summed_loss
from minilora.mixed_batch import refuse_row_names
from minilora.model import Transformer
from minilora.tokenizer import Tokenizer
from minilora.training_checkpoint import (
    Progress,
    fingerprint,
    latest_checkpoint,
    load_checkpoint,
    restore_parameters,
    save_adapter_atomically,
    save_checkpoint,
)
from minilora.training_config import TrainConfig
from minilora.training_interrupt import StopRequest, TrainingInterrupted
from minilora.training_log import Record, memory_mb, open_log, read_log
from minilora.variants.lora_fa import LoRAFA
from minilora.variants.lora_plus import parameter_groups

__all__ = ["DivergedError", "TrainConfig", "TrainResult", "TrainingInterrupted", "learning_rate_factor", "train"]

Rows = str | Path | Sequence[Row] | Sequence[dict[str, Any]] | Sequence[Example]
logger = logging.getLogger("minilora")


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
    rows: Rows,
    config: TrainConfig = TrainConfig(),  # noqa: B008 - it is frozen
    eval_rows: Rows | None = None,
    adapter: str = "default",
) -> TrainResult:
    """Train one adapter of the model, made the only active one, with AdamW on the rows' labelled tokens.

    `rows` and `eval_rows` are a path, dicts, `Row`s or `Example`s. The loss of a step is the sum of the cross-entropy
    over the step's labelled tokens divided by their number, however the step is split into passes.
    Raises InputError for unusable rows or settings, DivergedError for a loss or gradient that is not finite,
    TrainingInterrupted on Ctrl-C.
    """
    output_dir, checkpoint = Path(config.output_dir), checkpoint_to_resume(config)
    examples, skipped = _encode(rows, tokenizer, config.max_length, "training")
    eval_examples: list[Example] = []
    if eval_rows is not None:
        eval_examples, eval_skipped = _encode(eval_rows, tokenizer, config.max_length, "held-out")
        skipped = skipped + eval_skipped
    elif config.eval_every:
        raise InputError("eval_every needs eval_rows")

    refuse_row_names(model)
    set_adapter(model, adapter)
    if checkpoint is None:
        _refuse_without_data(model, adapter)
    parameters = _master_parameters(model, adapter)
    optimizer = _optimizer(model, adapter, config)
    optimizer.zero_grad()  # whatever a backward pass before left there
    steps_per_epoch = math.ceil(len(examples) / (config.batch_size * config.gradient_accumulation_steps))
    total_steps = config.max_steps or math.ceil(config.epochs * steps_per_epoch)
    _check_rank_schedule(model, adapter, total_steps)

    _seed_everything(config.seed)
    run = fingerprint(model, adapter, parameters, config.decisive(), examples, eval_examples)
    progress = load_checkpoint(checkpoint, model, adapter, parameters, optimizer, run) if checkpoint else Progress()
    stopped_early = _out_of_patience(progress, config)

    with (
        _training_mode(model, config.gradient_checkpointing),
        open_log(config, progress.step + 1, total_steps) as write,
        StopRequest() as stop,
    ):
        first_step, last_step = progress.step + 1, progress.step if stopped_early else total_steps
        for step, step_examples in _steps(examples, config, steps_per_epoch, first_step, last_step):
            started = time.perf_counter()

            # L = 1/n Σ −log p(label), n over the whole step: 8 passes of 1 row equal 1 pass of 8 rows
            n = label_tokens(step_examples)
            passes = _split(step_examples, config.batch_size)
            losses = []
            for pass_examples in passes:
                loss = summed_loss(model, collate(pass_examples, tokenizer.pad_token_id)) / n
                if not loss.requires_grad:
                    raise InputError(f"the loss does not depend on adapter {adapter!r}: is it merged or disabled?")
                loss.backward()
                losses.append(loss.detach())
            penalty = regularization(model)
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
            after_step(model, step)
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
                eval_loss = held_out_loss(model, eval_examples, tokenizer.pad_token_id, config.batch_size)
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


# --- before the loop --------------------------------------------------------------------------------------------------


def _encode(rows: Rows, tokenizer: Tokenizer, max_length: int, what: str) -> tuple[list[Example], list[Skipped]]:
    """Examples that can be trained on, and the rows that cannot: they are reported, never silently dropped."""
    if isinstance(rows, str | Path):
        rows = load_rows(rows)
    if not rows:
        raise InputError(f"there are no {what} rows")
    kinds = {type(row) for row in rows}
    if kinds == {Example}:
        examples, skipped = cast(list[Example], list(rows)), []
    elif kinds == {Row} or kinds == {dict}:
        given = cast(list[Row], rows) if kinds == {Row} else as_rows(cast(list[dict[str, Any]], rows))
        encoded = encode_rows(given, tokenizer, max_length)
        examples, skipped = encoded.examples, list(encoded.skipped)
    else:
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(f"{what} rows must be a path, or all dicts, all Rows or all Examples, not {names}")
    usable = []
    for example in examples:
        if len(example.input_ids) > max_length:
            skipped.append(
                Skipped(example.source, f"{len(example.input_ids)} tokens, more than max_length={max_length}")
            )
        elif label_tokens([example]) == 0:
            skipped.append(Skipped(example.source, "no token to learn: the loss is taken on assistant messages"))
        else:
            usable.append(example)
    if skipped:
        first = "; ".join(f"{row.source or 'a row'}: {row.reason}" for row in skipped[:3])
        message = f"{len(skipped)} of {len(rows)} {what} rows skipped ({first}{'; …' if len(skipped) > 3 else ''})"
        if not usable:
            raise InputError(f"no {what} row is left: {message}")
        logger.warning(message)
    return usable, skipped


def _refuse_without_data(model: nn.Module, name: str) -> None:
    """An adapter whose start was to be found in data, and was not, would train as a plain LoRA without a word."""
    for lora in adapters_named(model, name).values():
        if isinstance(lora, LoRA) and lora.awaits_data:
            start = lora.config.init_lora_weights
            raise InputError(
                f"adapter {name!r} has init_lora_weights={start!r} and has seen no data:"
                f" call minilora.variants.{start}.initialize(model, batches, {name!r}) before train"
            )


def _check_rank_schedule(model: nn.Module, name: str, total_steps: int) -> None:
    """AdaLoRA's ranks come down over the steps that its configuration counts: in fewer they would not get there."""
    planned = getattr(next(iter(adapters_named(model, name).values())).config, "total_step", None)
    if planned is not None and planned > total_steps:
        raise InputError(
            f"adapter {name!r} was made with total_step={planned}, and this run has {total_steps} steps: its ranks"
            " would not come down to target_r"
        )


def _master_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, made float32: a small update added to a bfloat16 weight is rounded away."""
    parameters = trainable_parameters(model)
    kept = {id(parameter) for parameter in adapter_parameters(model, adapter).values()}
    if others := [name for name, parameter in parameters.items() if id(parameter) not in kept]:
        raise InputError(
            f"{others[0]} is trainable, but the folder of adapter {adapter!r} has no place for it: freeze it first"
        )
    for parameter in parameters.values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return parameters


def _optimizer(model: nn.Module, adapter: str, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or what LoRA+ or LoRA-FA make of it; every group keeps its highest learning rate as `initial_lr`."""
    settings: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    parameters = [p for p in adapter_parameters(model, adapter).values() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if config.lora_fa:
        optimizer = LoRAFA(model, adapter, lr=config.learning_rate, **settings)
    elif config.loraplus_lr_ratio is None:
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, **settings)
    else:
        rates = {"lr": config.learning_rate, "lr_ratio": config.loraplus_lr_ratio}
        optimizer = torch.optim.AdamW(
            parameter_groups(model, adapter, weight_decay=config.weight_decay, **rates), **settings
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # of every GPU too


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """The checkpoint a run continues from, or None; InputError if output_dir holds a run that is not to be resumed."""
    latest = latest_checkpoint(Path(config.output_dir))
    if config.resume is None:
        if latest is not None:
            raise InputError(f'{latest} is there already: continue it with resume="auto", or choose another output_dir')
        return None
    if config.resume == "auto":
        return latest
    checkpoint = Path(config.resume)
    if not checkpoint.is_dir():
        raise InputError(f"resume: there is no checkpoint folder {checkpoint}")
    if checkpoint.resolve().parent != Path(config.output_dir).resolve():
        raise InputError(f"a run is resumed where its log is: set output_dir to {checkpoint.parent}")
    return checkpoint


# --- in the loop ------------------------------------------------------------------------------------------------------


def _steps(
    examples: list[Example], config: TrainConfig, steps_per_epoch: int, first_step: int, last_step: int
) -> Iterator[tuple[int, list[Example]]]:
    """Each step's number, counted from 1, and its rows; the order depends on seed and epoch only, so it resumes."""
    rows_per_step = config.batch_size * config.gradient_accumulation_steps
    order: list[list[int]] = []
    for step in range(first_step, last_step + 1):
        epoch, index = divmod(step - 1, steps_per_epoch)
        if index == 0 or step == first_step:
            order = batches(examples, rows_per_step, config.seed, epoch, config.group_by_length)
        yield step, [examples[i] for i in order[index]]


def _split(examples: list[Example], size: int) -> list[list[Example]]:
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def learning_rate_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """What the learning rate is multiplied by after `step` steps: transformers' schedules of the same names."""
    warmup = config.warmup_steps if config.warmup_steps >= 1 else math.ceil(config.warmup_steps * total_steps)
    if step < warmup:
        return step / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "linear":
        return max(0.0, 1 - done)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * done)))


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
    return (
        f"step {step}: the {what} on the rows {', '.join(sources)}; the parameters were not updated with it;"
        f" {saved}. A lower learning_rate, a smaller max_grad_norm or a look at these rows may help."
    )


@contextmanager
def _training_mode(model: nn.Module, gradient_checkpointing: bool) -> Iterator[None]:
    """Dropout on, and recomputation where asked for; afterwards the model is as it was."""
    was_training = model.training
    model.train()
    if gradient_checkpointing:
        _set_gradient_checkpointing(model, True)
    try:
        yield
    finally:
        model.train(was_training)
        if gradient_checkpointing:
            _set_gradient_checkpointing(model, False)


def _set_gradient_checkpointing(model: nn.Module, on: bool) -> None:
    if isinstance(model, Transformer):
        model.gradient_checkpointing = on
        return
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise InputError(f"{type(model).__name__} has no gradient checkpointing: set gradient_checkpointing to false")
    transformer: Any = model  # of the transformers library
    if on:
        # Reentrant checkpointing gives no gradient where a block's input needs none, as after a frozen embedding.
        transformer.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        transformer.gradient_checkpointing_disable()


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
