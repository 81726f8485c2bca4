"""What a benchmark shows and leaves behind: a table, a JSON file with every repeat, a plot."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """`rows` is the table, the same keys in each; `raw` every measurement; `plot` draws on a matplotlib figure."""

    benchmark: str
    title: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, str]]
    raw: dict[str, Any]
    plot: Callable[[Any], None] = field(repr=False)


def print_table(result: Result) -> None:
    """Show the rows, and where they were measured, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    machine = result.machine
    where = f"{machine['device']}, {machine['cpu']}, {machine['threads']} threads, {machine['date']}"
    table = Table(title=result.title, caption=where)
    for i, name in enumerate(result.rows[0]):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in result.rows:
        table.add_row(*row.values())
    Console().print(table)


def write(result: Result, folder: Path) -> list[Path]:
    """Write <benchmark>-<device>.json and .png, each under a temporary name first; returns their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    device = result.machine["device"].lower().replace(" ", "-")
    name = f"{result.benchmark}-{device}"
    content = {k: v for k, v in vars(result).items() if k != "plot"}
    written = [folder / f"{name}.json", folder / f"{name}.png"]
    temporary = [path.with_name(f".{path.name}.tmp") for path in written]
    temporary[0].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{result.title} ({result.machine['cpu']}, {result.machine['threads']} threads)", fontsize=10)
    result.plot(figure)
    figure.savefig(temporary[1], format="png", dpi=120)
    for source, target in zip(temporary, written, strict=True):
        source.replace(target)
    return written
