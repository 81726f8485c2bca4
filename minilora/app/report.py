"""What a run shows a person: before/after table, sample answers side by side, loss curve, one HTML file."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minilora.evaluation import Scores
from minilora.foreign_text import shown
from minilora.formats import atomic_files

SAMPLES = 3  # rows shown with every model's answer
LONGEST_ANSWER = 240  # characters shown of one


@dataclass
class Report:
    """Everything a run has to say. `scores`: label (a table row) -> held-out scores, in order;
    `best`: the label the run is about; `log`: the training log's records; `facts`: label -> text."""

    title: str
    summary: str
    scores: dict[str, Scores]
    best: str
    general: dict[str, dict[str, float]] = field(default_factory=dict)
    log: Sequence[dict[str, Any]] = ()
    facts: dict[str, str] = field(default_factory=dict)


def comparison_table(scores: dict[str, Scores], best: str) -> Table:
    """A rich table: one row a model, one column a metric, in percent with the 95% interval."""
    first = next(iter(scores.values()))
    table = Table(title=f"Held-out rows: {first.n}", title_justify="left")
    table.add_column("model")
    for column in ("loss", *first.metrics):
        table.add_column(column, justify="right")
    for label, score in scores.items():
        cells = [percent(score, metric) for metric in first.metrics]
        table.add_row(label, f"{score.loss:.3f}", *cells, style="bold green" if label == best else None)
    return table


def percent(score: Scores, metric: str) -> str:
    """ "96.1%  (91–98)": the share and its Wilson 95% interval."""
    low, high = score.intervals[metric]
    return f"{100 * score.metrics[metric]:.1f}%  ({100 * low:.0f}–{100 * high:.0f})"


def general_table(general: dict[str, dict[str, float]]) -> Table:
    """A rich table of the regression check: what the model knew before, and still knows."""
    table = Table(title="General ability, before and after", title_justify="left")
    table.add_column("model")
    for metric in next(iter(general.values())):
        table.add_column(metric, justify="right")
    for label, values in general.items():
        table.add_row(label, *(_number(metric, value) for metric, value in values.items()))
    return table


def _number(metric: str, value: float) -> str:
    return f"{value:.2f}" if "perplexity" in metric else f"{100 * value:.1f}%"


def show_samples(report: Report, console: Console) -> None:
    """Print a few held-out requests with every model's answer beside the accepted one."""
    for sample in _samples(report):
        table = Table(title=_cell(sample["request"]), title_justify="left", show_header=False, expand=True)
        table.add_column("model", no_wrap=True)
        table.add_column("answer", ratio=1)
        table.add_row("accepted", _cell(sample["expected"]), style="dim")
        for answer in sample["answers"]:
            mark = "[green]✓[/green]" if answer["right"] else "[red]✗[/red]"
            table.add_row(f"{mark} {escape(answer['label'])}", _cell(_shortened(answer["text"])))
        console.print(table)


def _cell(text: str) -> str:
    """What a model or a row says, in a table: neither markup of rich nor control characters of a terminal."""
    return escape(shown(text))


def _samples(report: Report) -> list[dict[str, Any]]:
    """Rows spread evenly over the held-out set: chosen by position, not by how well the answers came out."""
    some = next(iter(report.scores.values()))
    metric = list(some.metrics)[-1]
    samples = []
    for i in range(0, some.n, max(1, some.n // SAMPLES))[:SAMPLES]:
        predictions = {label: score.predictions[i] for label, score in report.scores.items()}
        answers = [
            {"label": label, "text": prediction.text, "right": bool(prediction.scores[metric])}
            for label, prediction in predictions.items()
        ]
        first = some.predictions[i]
        samples.append({"request": first.prompt, "expected": first.expected, "answers": answers})
    return samples


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_ANSWER else text[:LONGEST_ANSWER] + " …"


def loss_curve(log: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of the training loss by step (raw and smoothed) and the held-out loss where it was measured."""
    from matplotlib.figure import Figure  # here, because it takes the best part of a second

    steps = [record["step"] for record in log if "loss" in record]
    losses = [record["loss"] for record in log if "loss" in record]
    held_out = [(record["step"], record["eval_loss"]) for record in log if "eval_loss" in record]
    figure = Figure(figsize=(7.2, 3.4), dpi=160, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="training loss, each step")
    axes.plot(steps, smoothed(losses), color="#1f4e8c", linewidth=2, label="training loss, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#d1495b", label="validation loss")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per learned token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def smoothed(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start at zero (Adam's bias correction)."""
    average, result = 0.0, []
    for t, value in enumerate(values, start=1):
        average = decay * average + (1 - decay) * value
        result.append(average / (1 - decay**t))
    return result


def write_html(report: Report, path: Path) -> None:
    """Write the report as one HTML file that needs nothing beside it (pictures are inline)."""
    template = files("minilora.app").joinpath("data_files/report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(template).render(
        report=report,
        samples=_samples(report),
        curve=base64.b64encode(loss_curve(report.log)).decode() if report.log else None,
        percent=percent,
        number=_number,
        shortened=_shortened,
    )
    write_text(path, html)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_files(path.parent) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
