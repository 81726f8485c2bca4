"""Progress of long work: a bar on a terminal (by rich) and in a notebook, everywhere else plain lines.

    answering: 37 of 128 rows · 0:41 left

Where standard error is a file or a pipe (Docker, CI, nohup), such a line comes after five seconds, then every ten, and
at the end one that says how long it took. Work that is done sooner shows nothing.
"""

import html
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")
clock = time.monotonic
HEARTBEAT = 1.0  # seconds after which a stage looks at the clock, however long its item takes


@contextmanager
def progress_bar(label: str | None, total: int | None, unit: str = "") -> Iterator[Callable[..., None]]:
    """A stage of `total` items around the work inside the `with`, which is given `Stage.advance` to call.

    Without a label nothing is shown; without a total there is no estimate, only the time so far.
    """
    if label is None or _is_silent.get():
        yield lambda n, text=None, /: None
        return
    stage, finished = Stage(label, total, unit), False
    try:
        yield stage.advance
        finished = True
    finally:
        stage.close(finished)


def with_progress(items: Iterable[T], total: int | None, label: str | None, unit: str = "") -> Iterator[T]:
    """The items one after the other, as a stage of `total` of them."""
    with progress_bar(label, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def silent() -> Iterator[None]:
    """Inside the `with`, no stage shows anything."""
    token = _is_silent.set(True)
    try:
        yield
    finally:
        _is_silent.reset(token)


_is_silent: ContextVar[bool] = ContextVar("_is_silent", default=False)


# --- stages ----------------------------------------------------------------------------------------------------------

_lock = threading.RLock()  # a stage advances in one thread and is watched from another
_open: list["Stage"] = []  # the outer ones first


class Stage:
    """Work under way: how much of it is done, how long the rest will take, and where that is shown.

    Args:
        label: what is being done.
        total: how many items there are; None where nobody knows.
        unit: what the items are, such as "rows"; "%" shows their share in place of their number.
        done: how many are done already, in an earlier run.
        main: for a command's own work, such as training: shown from the first item on, and its end stays.
    """

    def __init__(self, label: str, total: int | None, unit: str = "", done: int = 0, main: bool = False) -> None:
        self.label, self.total, self.unit, self.done, self.main = label, total, unit, done, main
        self.text: str | None = None
        self.marks = [(clock(), done)]  # time and count at the start, after the first item, and now
        self.display = _display()
        self.due, self.shown = self.marks[0][0] + self.display.after, False
        self.closed = threading.Event()
        with _lock:
            _open.append(self)
        threading.Thread(target=self._watch, daemon=True).start()

    def advance(self, n: int, text: str | None = None, /) -> None:
        """Say that `n` more items are done; a text takes the place of label and count from then on."""
        with _lock:
            now = clock()
            self.done, self.text = self.done + n, text or self.text
            if n and self.main and len(self.marks) == 1:
                self.due = now
            if n:
                self.marks = [*self.marks[:2], (now, self.done)]
            self._show(now)

    def close(self, finished: bool) -> None:
        """The work is over, to its end or not."""
        with _lock:
            self.closed.set()
            _open.remove(self)
            if finished and self.total is not None:
                self.done = self.total
            if self.shown:
                took = f"{'done in' if finished else 'stopped after'} {_minutes(clock() - self.marks[0][0])}"
                self.display.close(self, took)

    def _watch(self) -> None:
        """Show life during a long item, such as a download or the SVD of a large weight."""
        while not self.closed.wait(HEARTBEAT):
            with _lock:
                if _open[-1:] == [self]:  # an outer stage is alive as long as the inner one is
                    self._show(clock())

    def _show(self, now: float) -> None:
        if now >= self.due and not self.closed.is_set():
            self.due, self.shown = now + self.display.every, True
            self.display.show(self, self._time(now))

    def state(self) -> str:
        """What is done, and how much of it."""
        if self.text is not None:
            return self.text
        if self.total is None:
            return f"{self.label}: {self.done:,} {self.unit}".rstrip() if self.done else self.label
        if self.unit == "%":
            return f"{self.label}: {self.share():.0%}"
        return f"{self.label}: {self.done:,} of {self.total:,} {self.unit}".rstrip()

    def share(self) -> float | None:
        """How much of the whole is done, from 0 to 1."""
        return None if self.total is None else min(1.0, self.done / max(self.total, 1))

    def _time(self, now: float) -> str:
        """The time left at the speed since the first item, which warms caches up; else the time so far."""
        if self.total is not None and len(self.marks) == 3:
            _, (t0, n0), (t1, n1) = self.marks
            left = (self.total - n1) * (t1 - t0) / max(n1 - n0, 1) - (now - t1)
            if left >= 0:
                return f"{_minutes(left)} left"
        return f"{_minutes(now - self.marks[0][0])} so far"


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# --- where they are shown --------------------------------------------------------------------------------------------


def _display() -> "Lines | TerminalBar | NotebookBar":
    ipython = sys.modules.get("IPython")
    if ipython is not None and hasattr(ipython.get_ipython(), "kernel"):
        return NotebookBar()
    # Not FORCE_COLOR, which many CI services set: it is about colours, and a bar would fill their log.
    return TerminalBar() if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else Lines()


class Lines:
    """A plain line now and then, for a log file or a pipe."""

    after, every = 5.0, 10.0  # seconds

    def show(self, stage: Stage, time: str) -> None:
        with suppress(OSError):  # a closed pipe must not end the work
            print(f"{stage.state()} · {time}", file=sys.stderr, flush=True)

    close = show


class TerminalBar:
    """A live bar; those of inner stages are below those of the outer ones."""

    after, every = 2.0, 0.1
    live: "Progress | None" = None  # the one that all stages share, while there are any

    def __init__(self) -> None:
        self.task: TaskID | None = None

    def show(self, stage: Stage, time: str) -> None:
        live = TerminalBar.live = TerminalBar.live or _live_bars()
        if self.task is None:
            self.task = live.add_task("", total=None if stage.total is None else 1.0, state=stage.state(), time=time)
        live.update(self.task, completed=stage.share(), state=stage.state(), time=time)
        live.start()  # unless it has been

    def close(self, stage: Stage, time: str) -> None:
        assert TerminalBar.live is not None and self.task is not None
        TerminalBar.live.remove_task(self.task)
        if not TerminalBar.live.tasks:
            TerminalBar.live.stop()
            TerminalBar.live = None
        if stage.main:
            print(f"{stage.state()} · {time}", file=sys.stderr)


def _live_bars() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
    from rich.table import Column

    return Progress(
        SpinnerColumn(),  # it moves during a long item too
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}", markup=False),
        TextColumn("{task.fields[time]}", style="cyan", table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else it goes into a file
    )


class NotebookBar:
    """The browser's own progress bar; in a front end without one, the text alone."""

    after, every = 2.0, 1.0

    def __init__(self) -> None:
        self.handle: Any = None

    def show(self, stage: Stage, time: str) -> None:
        from IPython.display import display

        text, share = f"{stage.state()} · {time}", stage.share()
        value = "" if share is None else f' value="{share:.4f}"'
        content = {"text/plain": text, "text/html": f"<progress{value}></progress> {html.escape(text)}"}
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)

    close = show
