"""What a benchmark shows and leaves behind: a table, a JSON file with every repeat, a plot."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """`rows` is the table, the same keys in each; `raw` every measurement; `plot` draws on a matplotlib figure.

    notes: lines below the table, such as targets met or missed; size: of the figure, in inches.
    """

    benchmark: str
    title: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, str]]
    raw: dict[str, Any]
    plot: Callable[[Any], None] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    size: tuple[float, float] = (11, 4)


def print_table(result: Result) -> None:
    """Show the rows, where they were measured, and the notes, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    machine = result.machine
    where = f"{_hardware(machine)}, {machine['date']}"
    table = Table(title=result.title, caption=where)
    for i, name in enumerate(result.rows[0]):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in result.rows:
        table.add_row(*row.values())
    console = Console(width=None if sys.stdout.isatty() else 500)  # a file has no width to break lines at
    console.print(table)
    for note in result.notes:
        console.print(note, markup=False, highlight=False)


def write(result: Result, folder: Path) -> list[Path]:
    """Write <benchmark>-<device>.json, then .png, each under a temporary name first; returns their paths.

    Of a CPU without AVX-512, where other cases are run, the instructions are named too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = result.machine["device"].lower().replace(" ", "-")
    if device == "cpu" and "AVX512" not in result.machine["instructions"]:
        device = f"cpu-{result.machine['instructions'][0].lower()}"  # where bfloat16 has no instructions: other cases
    name = f"{result.benchmark}-{device}"
    content = {k: v for k, v in vars(result).items() if k not in ("plot", "size")}
    written = [folder / f"{name}.json", folder / f"{name}.png"]
    temporary = [path.with_name(f".{path.name}.tmp") for path in written]
    temporary[0].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary[0].replace(written[0])
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=result.size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{result.title} ({_hardware(result.machine)})", fontsize=10)
    result.plot(figure)
    figure.savefig(temporary[1], format="png", dpi=120)
    temporary[1].replace(written[1])
    return written


def _hardware(machine: dict[str, Any]) -> str:
    """What did the work: the GPU, or the CPU with so many threads."""
    if machine["device"] != "cpu":
        return str(machine["device"])
    instructions = ", ".join(machine["instructions"])
    return f"{machine['cpu']}, {instructions}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
