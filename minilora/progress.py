"""A progress bar for what may take longer than two seconds."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_UNTIL_PROGRESS = 2.0
T = TypeVar("T")


@contextmanager
def progress_bar(label: str | None, total: int) -> Iterator[Callable[[int], None]]:
    """A function that advances a bar on stderr; the bar appears after two seconds, without a label never.

    Only on a terminal: a log file would get its control characters and empty lines.
    """
    done, began, bar = 0, time.monotonic(), None

    def advance(n: int) -> None:
        nonlocal done, bar, label
        done += n
        if bar is None and label is not None and time.monotonic() - began > SECONDS_UNTIL_PROGRESS:
            bar, label = _started_bar(label, total), None
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def with_progress(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """The items one after the other, `total` of them, under such a bar."""
    with progress_bar(label, total) as advance:
        for item in items:
            yield item
            advance(1)


def _started_bar(label: str, total: int) -> "Progress | None":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    columns = (TextColumn(label), BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    bar.add_task("", total=total)
    bar.start()
    return bar
