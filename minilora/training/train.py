"""The training loop, in one function: rows in; a trained adapter, checkpoints and a log out."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from minilora.adapters import adapter_class, adapters_named, set_adapter, summed_regularization
from minilora.data import Example, batches, collate, pack
from minilora.errors import InputError
from minilora.models import can_pack
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
from minilora.training.log import computes_with, memory_mb, open_log
from minilora.training.loss import held_out_loss, label_tokens, summed_loss
from minilora.training.loss_scale import FIRST_SCALE, needs_loss_scale, overflowed
from minilora.training.mode import refuse_untrainable, training_mode
from minilora.training.optimizer import make_masters, make_optimizer, parameters_to_train
from minilora.training.random_states import seed_everything
from minilora.training.result import DivergedError, TrainResult, diverged, result_of
from minilora.training.rows import TrainingRows, examples_of
from minilora.training.schedule import learning_rate_factor


def train(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: TrainingRows,
    config: TrainConfig = TrainConfig(),  # noqa: B008 - it is frozen
    eval_rows: TrainingRows | None = None,
    adapter: str = "default",
) -> TrainResult:
    """Train one adapter of the model with AdamW, on the labelled tokens of rows.

    The loss of a step is the sum of the cross-entropy over the step's labelled tokens divided by their number, however
    the step is split into passes. The adapter is made the only active one, and its parameters float32.

    Args:
        model: minilora's `Transformer` or a model of transformers; only adapters may be trainable in it.
        tokenizer: the model's, as `load` gives it, or `minilora.text.read_tokenizer`.
        rows: what to learn: the names of files (see `load_rows`); dicts, `Row`s or `Example`s; a DataFrame of pandas, a
            `datasets.Dataset` or a `pyarrow.Table`.
        config: the settings, each with a default.
        eval_rows: held-out rows, in the same forms, for `eval_every` and for the held-out loss at the end.
        adapter: the name of the adapter to train.

    Returns:
        What came out of the run; the model carries the trained adapter.

    Raises:
        InputError: rows, model or settings cannot be used, and nothing is changed; or a file cannot be written.
        DivergedError: a loss or gradient is not finite; the parameters are those of the step before.
        TrainingInterrupted: on Ctrl-C or SIGTERM, once the step is finished and saved.
    """
    # What can be refused is refused before anything is changed.
    output_dir, checkpoint = Path(config.output_dir), checkpoint_to_resume(config)
    examples, eval_examples, skipped = examples_of(rows, eval_rows, tokenizer, config)
    adapters, parameters = adapters_named(model, adapter), parameters_to_train(model, adapter)
    refuse_untrainable(model, adapter, config, examples + eval_examples)
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
    stopped_early = progress.is_out_of_patience(config)

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
        for step, passes in _steps(examples, config, packing, steps_per_epoch, first_step, last_step):
            started = time.perf_counter()

            # L = 1/n Σ −log p(label), n over the whole step: 8 passes of 1 row equal 1 pass of 8 rows
            n = sum(map(label_tokens, passes))
            while True:
                losses = []
                for pass_examples in passes:
                    batch = pack(pass_examples) if packing else collate(pass_examples, tokenizer.pad_token_id)
                    loss = summed_loss(model, batch) / n
                    if loss.requires_grad:
                        (progress.loss_scale * loss).backward()
                    losses.append(loss.detach())
                if not overflowed(parameters.values(), losses, progress):  # in float16 alone
                    break
            if all(parameter.grad is None for parameter in parameters.values()):
                raise InputError(f"the loss does not depend on adapter {adapter!r}: its layers take no part in it")
            penalty = summed_regularization(adapters.values())
            if isinstance(penalty, torch.Tensor):
                penalty.backward()
            pass_losses = torch.stack(losses).tolist()
            grad_norm = clip_grad_norm_(parameters.values(), config.max_grad_norm or math.inf).item()
            if not math.isfinite(sum(pass_losses)) or not math.isfinite(grad_norm):
                optimizer.zero_grad()  # the parameters stay those of the step before
                raise DivergedError(diverged(step, pass_losses, grad_norm, passes, checkpoint))

            factor = learning_rate_factor(config, step - 1, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            optimizer.step()
            variant.after_step(adapters, step)
            optimizer.zero_grad()

            seconds = time.perf_counter() - started
            tokens = sum(len(example.input_ids) for pass_examples in passes for example in pass_examples)
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

            stopped_early = progress.is_out_of_patience(config)
            if is_best or stopped_early or stop.made or _due(config.save_every, step, total_steps):
                checkpoint = save_checkpoint(
                    output_dir, model, adapter, parameters, optimizer, progress, run, config.keep_last
                )
                if stop.made:
                    raise TrainingInterrupted(checkpoint, step, total_steps)
                if stopped_early:
                    break

    assert checkpoint is not None  # that of the last step
    if config.early_stopping_patience and progress.best_step is not None:
        restore_parameters(output_dir, progress.best_step, parameters)
    save_adapter_atomically(output_dir / "adapter", model, adapter)
    return result_of(config, checkpoint, progress, stopped_early, skipped)


def _steps(
    examples: list[Example], config: TrainConfig, packing: bool, steps_per_epoch: int, first_step: int, last_step: int
) -> Iterator[tuple[int, list[list[Example]]]]:
    """Each step's number, counted from 1, and the rows of its passes; their order depends on seed and epoch alone."""
    size = config.batch_size
    order: list[list[int]] = []
    for step in range(first_step, last_step + 1):
        epoch, index = divmod(step - 1, steps_per_epoch)
        if index == 0 or step == first_step:
            rows_per_step = size * config.gradient_accumulation_steps
            order = batches(examples, rows_per_step, config.seed, epoch, config.group_by_length and not packing)
        rows = [examples[i] for i in order[index]]
        yield step, [rows[i : i + size] for i in range(0, len(rows), size)]


def _due(every: int | None, step: int, total_steps: int) -> bool:
    return step == total_steps or (every is not None and step % every == 0)
