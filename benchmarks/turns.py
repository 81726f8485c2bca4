"""Trainers that take turns, each in a process of its own, and each running its own training loop.

One process's allocator, threads and patches stay out of another's way, and its peak memory is its own. A turn lasts
from one step of the optimizer to the next: PyTorch calls a hook there, whatever loop the step is in, and the process
waits in it until its next turn. So what is timed is whole: the batch, the loss, both passes, the step, the log.
"""

import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.measure import peak_memory_mb, reset_peak_memory
from minilora.errors import InputError
from minilora.machine import use_available_cores
from minilora.progress import silent


@dataclass(frozen=True)
class Contender:
    """A model with one adapter, and a call that trains it from the first step to the last and returns every loss."""

    model: nn.Module
    train: Callable[[], list[float]]


@dataclass(frozen=True)
class Trained:
    """What a contender says at the end; memory in MiB, the peak that of its steps."""

    losses: list[float]
    loaded_mb: float
    peak_mb: float
    held_out_loss: float | None


class Runner:
    """A contender in its own process: `ready` once it is built, then `turn` for every step, then `finish`."""

    def __init__(
        self,
        build: Callable[[Any], Contender],
        task: Any,
        evaluate: Callable[[nn.Module, Any], float | None],
        device: torch.device,
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads and CUDA in no usable state
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, task, evaluate, device))
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait until the contender is built. Raises InputError with what kept it from that."""
        self._receive()

    def turn(self) -> None:
        """One step, from its batch to the optimizer's step."""
        self._pipe.send(None)
        self._receive()

    def finish(self) -> Trained:
        """Let the training loop come to its end, and take what it found."""
        self._pipe.send(None)
        trained: Trained = self._receive()
        return trained

    def close(self) -> None:
        """End the process, wherever it is."""
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            failure, value = self._pipe.recv()
        except EOFError:
            raise InputError("its process ended without a word, as when memory runs out") from None
        if failure is not None:
            raise InputError(failure)
        return value


@silent()  # the process that gives the turns shows how far they are
def _serve(
    pipe: Connection,
    build: Callable[[Any], Contender],
    task: Any,
    evaluate: Callable[[nn.Module, Any], float | None],
    device: torch.device,
) -> None:
    """The process's whole life: every message is (None, value) or (what went wrong, None)."""
    use_available_cores()
    warnings.simplefilter("ignore", FutureWarning)  # what the next version of a library will rename
    try:
        contender = build(task)
        reset_peak_memory(device)
        loaded = peak = peak_memory_mb(device)
        pipe.send((None, None))

        def end_of_turn(*_: object) -> None:
            nonlocal peak
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            pipe.send((None, None))
            peak = peak_memory_mb(device)
            pipe.recv()

        pipe.recv()
        hook = register_optimizer_step_post_hook(end_of_turn)
        losses = contender.train()
        hook.remove()
        pipe.send((None, Trained(losses, loaded, peak, evaluate(contender.model, task))))
    except InputError as error:
        pipe.send((str(error), None))
    except Exception as error:
        traceback.print_exc()
        pipe.send((f"{type(error).__name__}: {error}".splitlines()[0], None))
