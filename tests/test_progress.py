import pytest

from minilora.progress import progress_bar, with_progress


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr("minilora.progress.SECONDS_UNTIL_PROGRESS", -1.0)


def test_a_terminal_sees_the_bar_and_the_items_come_through(at_once, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for a terminal
    assert list(with_progress(iter("abc"), 3, "Reading")) == ["a", "b", "c"]
    shown = capsys.readouterr()
    assert "Reading" in shown.err and "100%" in shown.err and shown.out == ""


def test_a_log_file_gets_nothing_not_even_an_empty_line(at_once, capsys):
    assert list(with_progress(range(3), 3, "Reading")) == [0, 1, 2]
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_the_bar_is_taken_down_when_the_work_fails(at_once, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(RuntimeError), progress_bar("Reading", 3) as advance:
        advance(1)
        raise RuntimeError
    assert capsys.readouterr().err.count("\x1b[?25h") == 1  # the cursor is visible again
