"""Ctrl-C during training: finish the step, save it, say how to go on."""

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the step was finished and saved in `checkpoint`; the message says how to resume."""

    def __init__(self, checkpoint: Path, step: int, total_steps: int) -> None:
        self.checkpoint = checkpoint
        super().__init__(
            f"step {step} of {total_steps} is saved in {checkpoint}; to go on from there, start the same run again with"
            ' resume="auto" (--resume auto)'
        )


class StopRequest:
    """Within, the first Ctrl-C or SIGTERM only asks to stop after the step, where a checkpoint can be made."""

    def __init__(self) -> None:
        self.made = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        print("\nstopping after this step, to save it (once more: stop at once)", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
