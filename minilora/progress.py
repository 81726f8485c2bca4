"""A progress bar for what may take longer than two seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_UNTIL_PROGRESS = 2.0


@contextmanager
def progress_bar(label: str | None, total: int) -> Iterator[Callable[[int], None]]:
    """A function that advances a bar on stderr; the bar appears after two seconds, without a label never."""
    done, began, bar = 0, time.monotonic(), None

    def advance(n: int) -> None:
        nonlocal done, bar
        done += n
        if bar is None and label is not None and time.monotonic() - began > SECONDS_UNTIL_PROGRESS:
            bar = _started_bar(label, total)
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _started_bar(label: str, total: int) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=total)
    bar.start()
    return bar
