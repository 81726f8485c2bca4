"""Progress: when a line comes, what it says, the bar on a terminal (a pseudo-terminal here) and in a real kernel."""

import io
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbclient
import nbformat
import pytest
from helpers.terminal import Terminal

from minilora import progress
from minilora.progress import Stage, progress_bar, silent, with_progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Log(io.StringIO):
    """A file, with the time at which each line was flushed to it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.lines = clock, []

    def flush(self) -> None:
        new = self.getvalue().splitlines()[len(self.lines) :]
        self.lines += [(self.clock.now - 1000, line) for line in new]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "clock", clock)
    return clock


@pytest.fixture
def log(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log(clock)
    # not sys.stderr itself, which pytest sets again before the test
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=log, stdout=sys.stdout, modules=sys.modules))
    return log


@pytest.fixture
def no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is done moves a stage on: whatever the machine's speed, the lines are the same."""
    monkeypatch.setattr(progress, "HEARTBEAT", 3600.0)


# --- lines -----------------------------------------------------------------------------------------------------------


def test_lines_come_by_the_clock_and_are_flushed_at_once(clock: Clock, log: Log, no_heartbeat: None) -> None:
    for item in with_progress(iter(range(30)), 30, "Reading", "rows"):
        clock.now += 1
        assert item < 30
    assert log.lines == [
        (5, "Reading: 5 of 30 rows · 0:25 left"),
        (15, "Reading: 15 of 30 rows · 0:15 left"),
        (25, "Reading: 25 of 30 rows · 0:05 left"),
        (30, "Reading: 30 of 30 rows · done in 0:30"),
    ]


def test_what_is_quick_says_nothing(clock: Clock, log: Log, no_heartbeat: None) -> None:
    for _ in with_progress(range(4), 4, "Reading"):
        clock.now += 1
    clock.now += 60
    assert log.getvalue() == ""


@pytest.mark.parametrize("how", ["label", "silent"])
def test_nothing_is_said_unasked(clock: Clock, log: Log, how: str) -> None:
    def work(label: str | None) -> None:
        for _ in with_progress(range(4), 4, label):
            clock.now += 60

    if how == "label":
        work(None)
    else:
        with silent():
            work("Reading")
    assert log.getvalue() == ""
    work("Reading")
    assert log.getvalue() != ""


def test_a_log_has_no_control_characters_whatever_the_colours(
    clock: Clock, log: Log, no_heartbeat: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in many CI services
    for _ in with_progress(range(4), 4, "Reading"):
        clock.now += 60
    assert len(log.lines) == 5
    assert log.getvalue().replace("\n", "").isprintable()


def test_a_dumb_terminal_gets_lines(clock: Clock, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with progress_bar("Reading", 4) as advance:
        clock.now += 60
        advance(1)
    assert log.lines[0] == (60, "Reading: 1 of 4 · 1:00 so far")


def test_work_that_fails_says_how_far_it_came(clock: Clock, log: Log, no_heartbeat: None) -> None:
    with pytest.raises(RuntimeError), progress_bar("Writing", 2000, "%") as advance:
        clock.now += 3700
        advance(500)
        clock.now += 100
        raise RuntimeError
    assert log.lines == [(3700, "Writing: 25% · 1:01:40 so far"), (3800, "Writing: 25% · stopped after 1:03:20")]
    assert progress._open == []


def test_a_reader_that_has_gone_does_not_end_the_work(
    clock: Clock, log: Log, no_heartbeat: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush() -> None:
        raise BrokenPipeError

    monkeypatch.setattr(log, "flush", flush)
    for _ in with_progress(range(4), 4, "Reading"):
        clock.now += 60
    assert log.getvalue().endswith("done in 4:00\n")


# --- the time left ---------------------------------------------------------------------------------------------------


def test_the_first_item_does_not_count_and_the_estimate_runs_down_until_it_is_used_up(
    clock: Clock, log: Log, no_heartbeat: None
) -> None:
    stage = Stage("Merging", 5)

    def at(seconds: float) -> str:
        clock.now = 1000 + seconds
        return stage._time(clock.now)

    assert at(3) == "0:03 so far"
    clock.now = 1100  # the first takes long: caches, compilation
    stage.advance(1)
    assert at(101) == "1:41 so far"
    clock.now = 1110
    stage.advance(1)
    assert at(110) == "0:30 left"
    assert at(115) == "0:25 left"
    assert at(140) == "0:00 left"
    assert at(141) == "2:21 so far"
    clock.now = 1150  # 50 s for two items since the first one
    stage.advance(1)
    assert at(150) == "0:50 left"
    stage.close(finished=False)


def test_what_was_done_before_does_not_count(clock: Clock, log: Log, no_heartbeat: None) -> None:
    stage = Stage("Training", 1000, "steps", done=900)
    for _ in range(11):
        clock.now += 2
        stage.advance(1)
    assert log.lines[-1] == (16, "Training: 908 of 1,000 steps · 3:04 left")
    stage.close(finished=False)


def test_without_a_total_it_is_the_time_so_far(clock: Clock, log: Log, no_heartbeat: None) -> None:
    for _ in with_progress(range(12), None, "Reading", "rows"):
        clock.now += 1
    assert log.lines == [(5, "Reading: 5 rows · 0:05 so far"), (12, "Reading: 12 rows · done in 0:12")]


# --- one long item, stages inside stages -----------------------------------------------------------------------------


def wait_until(happened: Any) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_long_item_shows_life(clock: Clock, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT", 0.005)
    with progress_bar("Fetching", None):
        clock.now += 8
        wait_until(lambda: len(log.lines) == 1)
        clock.now += 9
        time.sleep(0.05)
        clock.now += 2
        wait_until(lambda: len(log.lines) == 2)
    assert [line for _, line in log.lines] == [
        "Fetching · 0:08 so far",
        "Fetching · 0:19 so far",
        "Fetching · done in 0:19",
    ]
    wait_until(lambda: not any("_watch" in thread.name for thread in threading.enumerate()))


def test_an_outer_stage_leaves_the_lines_to_the_inner_one(
    clock: Clock, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT", 0.005)
    with progress_bar("Merging", 2, "models"):
        with progress_bar("Rounding", 2, "layers"):
            clock.now += 20
            wait_until(lambda: log.lines)
            time.sleep(0.05)
            assert log.lines == [(20, "Rounding: 0 of 2 layers · 0:20 so far")]
        wait_until(lambda: len(log.lines) == 3)
        assert log.lines[1:] == [
            (20, "Rounding: 2 of 2 layers · done in 0:20"),
            (20, "Merging: 0 of 2 models · 0:20 so far"),
        ]


# --- a terminal ------------------------------------------------------------------------------------------------------


def test_a_terminal_has_a_bar_with_the_inner_stage_below(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal(monkeypatch) as terminal, progress_bar("Merging", 2, "models") as advance:
        clock.now += 3
        advance(1)
        for i in with_progress(range(2), 2, "Rounding", "layers"):
            clock.now += 3
            print("a line of the caller's")
            wait_until(lambda i=i: i == 0 or "Rounding: 1 of 2 layers" in terminal.text())  # drawn 10 times a second
    text = terminal.text()
    assert "Merging: 1 of 2 models 0:03 so far" in re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "━" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "one bar, and then the cursor is back"
    assert "caller" not in text and capsys.readouterr().out == "a line of the caller's\n" * 2
    assert progress.TerminalBar.live is None


def test_a_terminal_keeps_the_end_of_what_the_user_came_for(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with Terminal(monkeypatch) as terminal:
        stage = Stage("Training", 2, main=True)
        stage.advance(1, "step 1/2 · loss 2.0")
        assert stage.shown, "at once"
        clock.now += 100
        stage.advance(1, "step 2/2 · loss 1.0")
        stage.close(finished=True)
    assert terminal.text().endswith("step 2/2 · loss 1.0 · done in 1:40\r\n")


def test_the_bar_is_taken_down_when_the_work_fails(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with Terminal(monkeypatch) as terminal, pytest.raises(RuntimeError), progress_bar("Reading", 3) as advance:
        clock.now += 3
        advance(1)
        raise RuntimeError
    assert terminal.text().count("\x1b[?25h") == 1


# --- a notebook ------------------------------------------------------------------------------------------------------

LOAD = f"""
import importlib.util, time
spec = importlib.util.spec_from_file_location("progress", {str(Path(progress.__file__))!r})
progress = importlib.util.module_from_spec(spec)
spec.loader.exec_module(progress)
progress.NotebookBar.after = 0.05
progress.HEARTBEAT = 0.02
"""
ADVANCING = """
for _ in progress.with_progress(range(5), 5, "Reading <b>", "rows"):
    time.sleep(0.03)
"""
ONE_LONG_ITEM = """
with progress.progress_bar("Fetching", None):
    time.sleep(0.5)
"""


def test_a_notebook_has_a_bar_of_its_own_under_the_cell() -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in (LOAD, ADVANCING, ONE_LONG_ITEM)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=60).execute()
    outputs = [cell.outputs for cell in cells]
    assert [[output.output_type for output in of_cell] for of_cell in outputs] == [[], *[["display_data"]] * 2]
    advancing, one_long_item = (of_cell[0].data for of_cell in outputs[1:])
    assert advancing["text/plain"] == "Reading <b>: 5 of 5 rows · done in 0:00"  # or later
    assert advancing["text/html"].startswith('<progress value="1.0000"></progress> Reading &lt;b&gt;: 5 of 5 rows')
    assert one_long_item["text/html"].startswith("<progress></progress> Fetching · done in ")
