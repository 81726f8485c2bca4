import base64
import io
import re
import struct

import pytest
from rich.console import Console

from minilora.app.report import (
    Report,
    comparison_table,
    general_table,
    loss_curve,
    show_samples,
    smoothed,
    write_html,
    write_text,
)
from minilora.evaluation.evaluate import Prediction, Scores

HOSTILE = "<script>alert(1)</script> [bold]not markup[/bold] \x1b]0;title\x07"


def scores(right, n=10):
    predictions = [
        Prediction(
            f"request {i} {HOSTILE}", f"expected {i}", f"answer {i} {HOSTILE}", {"exact match": i < right}, f"r{i}"
        )
        for i in range(n)
    ]
    return Scores(0.5, {"exact match": right / n}, {"exact match": (0.1, 0.9)}, n, predictions)


@pytest.fixture
def report():
    log = [{"step": i, "loss": 1 / i} for i in range(1, 20)] + [{"step": 10, "eval_loss": 0.3}]
    general = {"base": {"perplexity": 12.345, "accuracy": 0.5}, "tuned": {"perplexity": 13.0, "accuracy": 0.475}}
    return Report(
        "A <title>", "It learned.", {"base": scores(0), "tuned": scores(7)}, "tuned", general, log, {"Who": "<me>"}
    )


def printed(*things):
    console = Console(width=120, record=True, file=io.StringIO())
    for thing in things:
        console.print(thing)
    return console.export_text()


def test_the_table_shows_every_model_with_its_interval(report):
    text = printed(comparison_table(report.scores, "tuned"))
    assert re.search(r"base .* 0\.500 .* 0\.0%  \(10–90\)", text)
    assert re.search(r"tuned .* 70\.0%  \(10–90\)", text)


def test_the_general_table_tells_perplexity_from_shares(report):
    text = printed(general_table(report.general))
    assert re.search(r"base .* 12\.35 .* 50\.0%", text)
    assert re.search(r"tuned .* 13\.00 .* 47\.5%", text)


def test_samples_show_what_was_answered_and_whether_it_was_right(report):
    console = Console(width=160, record=True, file=io.StringIO())
    show_samples(report, console)
    text = console.export_text()
    assert text.count("✓ tuned") == 3 and text.count("✗ base") == 3  # rows 0, 3 and 6; 7 are right
    assert "[bold]not markup[/bold]" in text  # an answer is never read as markup
    assert "\x1b" not in console.file.getvalue()  # nor does it steer the terminal


def test_the_page_stands_alone_and_escapes_what_models_say(report, tmp_path):
    path = tmp_path / "report.html"
    write_html(report, path)
    html = path.read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)  # nothing is loaded from elsewhere
    (picture,) = re.findall(r"data:image/png;base64,([^\"]+)", html)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert "A &lt;title&gt;" in html and "12.35" in html and "70.0%" in html


def test_a_report_without_a_log_or_a_general_check_is_still_a_page(report, tmp_path):
    report.log, report.general = [], {}
    write_html(report, tmp_path / "report.html")
    assert "data:image" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_curve_is_a_png_with_room_to_read(report):
    picture = loss_curve(report.log)
    width, height = struct.unpack(">II", picture[16:24])
    assert width >= 1000 and height >= 500


def test_smoothing_keeps_a_constant_and_has_no_start_up_bias():
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smoothed([1.0, 0.0]) == pytest.approx([1.0, 0.09 / 0.19])  # (0.9·0.1·1 + 0.1·0) / (1 − 0.9²)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")  # half of a surrogate pair cannot be written
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
