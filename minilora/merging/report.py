"""What a merge would lose, layer by layer and for each format that the merged weights may be stored in.

    wanted      D = W' − W              what the adapters change, in float64
    realised    R = F(W') − F(W)        what is left of it when both are read back from the format F
    kept        ⟨D, R⟩ / ‖D‖²           how far R goes along D; 0: erased, 1: all the way
    cosine      ⟨D, R⟩ / ‖D‖‖R‖         1: the same direction
    rel. error  ‖R − D‖ / ‖D‖           0: the same change

R is taken against the base as F holds it. For an NF4 base and F = NF4 that is the base itself, Q(W + Δ) − Q(W): there
every weight lies on one of the 16 values, and a change of less than half the way to the next one is rounded back. A
dense base is quantized for the comparison, so that R shows what the adapters do and not what quantizing W does.

Erased means that less than ½ is kept: along D the merged layer is then nearer to the base than to the tuned one. The
cosine alone does not tell. R is kept·D + noise, and where W is not on F's grid, as a dequantized NF4 weight is not on
bfloat16's, rounding is as likely up as down: D arrives in full, under noise that is small beside W though not beside D.
docs/merging.md has such a merge, which loses nothing. On the grid, kept itself falls to zero.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minilora.adapters import AdaptedLayer, adapted_layers, refuse_merged
from minilora.devices import device_for_float64
from minilora.errors import InputError
from minilora.nf4 import NF4Linear, dequantize, quantize
from minilora.progress import with_progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GGUF_BLOCKS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # of save_gguf
FORMATS = (*FLOATS, "nf4", *GGUF_BLOCKS)
ERASED = 0.5
CHUNK = 1 << 20  # weights compared at a time


@dataclass(frozen=True)
class LayerChange:
    """What one format keeps of one layer's change; where there is none, rms is 0 and all of it is kept."""

    layer: str
    format: str
    kept: float
    """share of D that is in R; 0 where the merged weight overflows the format"""
    cosine: float
    """of D and R; 0 where R is zero, or the merged weight overflows the format"""
    relative_error: float
    """‖R − D‖ / ‖D‖; infinite where the merged weight overflows the format"""
    rms: float
    """of D"""
    rms_of_base: float
    """of W"""

    @property
    def is_erased(self) -> bool:
        """True where less than half of the change arrives, or the format cannot hold the weight."""
        return self.kept < ERASED


@dataclass(frozen=True)
class FormatSummary:
    """All layers of one format."""

    format: str
    layers: int
    erased: int
    median_kept: float
    worst_kept: float
    worst_layer: str
    median_cosine: float
    worst_cosine: float
    median_relative_error: float
    worst_relative_error: float


@dataclass(frozen=True)
class MergeReport:
    """`rows`: one LayerChange for each format and layer, a format's rows together, what keeps least first.

    print(report) gives one line a format and the warnings, `show` tables.
    """

    rows: list[LayerChange]

    @property
    def formats(self) -> list[str]:
        """The formats that the report has rows of, in the order in which they were asked for."""
        return list(dict.fromkeys(row.format for row in self.rows))

    def of(self, format: str) -> list[LayerChange]:
        """The rows of one format, what keeps least first."""
        return [row for row in self.rows if row.format == format]

    def summary(self, format: str) -> FormatSummary:
        rows = self.of(format)
        kept, cosines = [row.kept for row in rows], [row.cosine for row in rows]
        errors = [row.relative_error for row in rows]
        return FormatSummary(
            format=format,
            layers=len(rows),
            erased=sum(row.is_erased for row in rows),
            median_kept=median(kept),
            worst_kept=kept[0],
            worst_layer=rows[0].layer,
            median_cosine=median(cosines),
            worst_cosine=min(cosines),
            median_relative_error=median(errors),
            worst_relative_error=max(errors),
        )

    @property
    def warnings(self) -> list[str]:
        """One sentence for each format that erases the adapters in some layer, or that a weight overflows."""
        found = []
        for format in self.formats:
            rows, summary = self.of(format), self.summary(format)
            overflowing = [row.layer for row in rows if math.isinf(row.relative_error)]
            if overflowing:
                found.append(f"{format} cannot hold {len(overflowing)} merged layers, {overflowing[0]} for one")
            elif summary.erased:
                way_out = "use merge_to_nf4 or merge_to_lora" if format == "nf4" else "merge into float32"
                found.append(
                    f"{format} would erase the adapters in {summary.erased} of {summary.layers} layers (less than"
                    f" {ERASED:.0%} of the change is kept): {way_out}"
                )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no infinity: null stands for it."""
        return {
            "summaries": [_for_json(asdict(self.summary(format))) for format in self.formats],
            "warnings": self.warnings,
            "rows": [_for_json(asdict(row)) for row in self.rows],
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        summaries = [self.summary(format) for format in self.formats]
        lines = [
            f"{s.format}: keeps {s.median_kept:.0%} of the change (median; {s.worst_kept:.0%} in"
            f" {s.worst_layer}), median cosine {_cosine(s.median_cosine)}"
            for s in summaries
        ]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])

    # --- tables

    def summary_table(self) -> Table:
        """A rich table, one row a format."""
        from rich.table import Table  # imported where it is used, as is gguf: `import minilora` needs neither

        table = Table(title="What a merge keeps of the adapters: median and worst layer", title_justify="left")
        table.add_column("format", no_wrap=True)
        for name in ("kept", "worst", "cosine", "worst", "rel. error", "erased"):
            table.add_column(name, justify="right", no_wrap=True)
        for format in self.formats:
            s = self.summary(format)
            table.add_row(
                format,
                f"{s.median_kept:.0%}",
                f"{s.worst_kept:.0%}",
                _cosine(s.median_cosine),
                _cosine(s.worst_cosine),
                _error(s.median_relative_error),
                f"{s.erased} of {s.layers}",
                style="bold red" if s.erased else None,
            )
        return table

    def layer_table(self, format: str, limit: int | None = 10) -> Table:
        """A rich table of a format's layers, what keeps least first; all of them without a limit."""
        rows = self.of(format)
        from rich.table import Table

        table = Table(title=f"{format}, layer by layer, the worst first", title_justify="left")
        table.add_column("layer", overflow="ellipsis", no_wrap=True)
        for name in ("rms W", "change", "kept", "cosine", "error"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows[:limit]:
            sizes = f"{row.rms_of_base:.1e}", f"{row.rms:.1e}"
            numbers = f"{row.kept:.0%}", _cosine(row.cosine), _error(row.relative_error)
            table.add_row(row.layer, *sizes, *numbers, style="red" if row.is_erased else None)
        if hidden := len(rows) - table.row_count:
            table.caption = f"and {hidden} more, which keep more"
        return table

    def show(self, limit: int | None = 10, console: Console | None = None) -> None:
        """Print both tables, the second for the format that keeps least, and the warnings; colours on a terminal."""
        from rich.console import Console

        console = console or Console()
        worst = min(self.formats, key=lambda format: self.summary(format).worst_kept)
        console.print(self.summary_table())
        console.print(self.layer_table(worst, limit))
        self.show_warnings(console)

    def show_warnings(self, console: Console) -> None:
        for warning in self.warnings:
            console.print(f"[bold red]warning:[/bold red] {warning}", highlight=False)


@torch.no_grad()
def merge_report(model: nn.Module, formats: Sequence[str] = ("float32", "bfloat16", "float16", "nf4")) -> MergeReport:
    """Compare, for every layer with active adapters, the change they make with what is left of it in each format.

    Any variant; the model is not changed. One layer is in memory at a time: some 24 bytes for each of its weights.

    Args:
        model: The model with the adapters, not merged.
        formats: "float32", "bfloat16", "float16" and "float64" as `merge` and `save_pretrained` round to them, and
            "nf4" as requantizing does, with NF4Linear's settings, or `load`'s for a dense layer; linear layers only.
            "q8_0" and the other types of `save_gguf`.

    Returns:
        The report: print it, `show()` its tables, or take its `rows`.

    Raises:
        InputError: for an unknown format, a merged model, or one without active adapters.
    """
    for format in formats:
        if format not in FORMATS:
            raise InputError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    refuse_merged(model)
    layers = {path: layer for path, layer in adapted_layers(model).items() if layer.changes_weight()}
    if not layers:
        raise InputError("the model has no active adapter that changes a weight")
    items = with_progress(layers.items(), len(layers), "Comparing formats", "layers")
    rows = [row for path, layer in items for row in _layer_changes(path, layer, formats)]
    rows.sort(key=lambda row: (formats.index(row.format), row.kept))
    return MergeReport(rows)


def _layer_changes(path: str, layer: AdaptedLayer, formats: Sequence[str]) -> list[LayerChange]:
    W, merged = layer.kind.weight(layer.base_layer), layer.merged_weight()[0]
    W, merged = W.to(device_for_float64(W.device)), merged.to(device_for_float64(W.device))
    D = _exact_merged_weight(layer, W) - W
    scale = 1 / math.sqrt(W.numel())
    rms, rms_of_base = (D.norm() * scale).item(), (W.norm(dtype=torch.float64) * scale).item()
    found = []
    for format in formats:
        if format == "nf4" and not layer.kind.is_linear:
            continue
        is_in_it = format == "nf4" and isinstance(layer.base_layer, NF4Linear)  # then W is on the grid as it is
        base = W if is_in_it else read_back(W, format, layer)
        kept, cosine, error = compare_changes(D, read_back(merged, format, layer), base)
        found.append(LayerChange(path, format, kept, cosine, error, rms, rms_of_base))
    return found


def _exact_merged_weight(layer: AdaptedLayer, W: Tensor) -> Tensor:
    """W' in float64, from copies of the adapters, which are small."""
    W = W.double()
    for adapter in layer.active_adapters():
        W = copy.deepcopy(adapter).to(W.device).double().merged_weight(W)
    return W


def read_back(W: Tensor, format: str, layer: AdaptedLayer) -> Tensor:
    """F(W): a weight (out, in, *kernel) as it is read after it was stored in the format in the layer's place."""
    if format in FLOATS:
        return W.to(FLOATS[format])
    if format in GGUF_BLOCKS:
        return _in_gguf_blocks(W, format)
    if not W.isfinite().all():
        return torch.full_like(W, torch.nan)
    base = layer.base_layer
    settings = (base.block_size, base.offset is not None) if isinstance(base, NF4Linear) else ()
    return dequantize(quantize(W, *settings), torch.float32)


def _in_gguf_blocks(W: Tensor, format: str) -> Tensor:
    import gguf

    kind = gguf.GGMLQuantizationType[format.upper()]
    if W[0].numel() % (block := gguf.GGML_QUANT_SIZES[kind][0]):
        raise InputError(f"a layer has rows of {W[0].numel()} numbers, and {format} takes them in blocks of {block}")
    blocks = gguf.quantize(W.detach().flatten(1).float().cpu().numpy(), kind)
    return torch.from_numpy(gguf.dequantize(blocks, kind)).view(W.shape).to(W.device)


def compare_changes(D: Tensor, merged: Tensor, base: Tensor) -> tuple[float, float, float]:
    """Kept, cosine and relative error of R = merged − base against D, of one shape; sums in float64, piece by piece.

    Where D is zero: 1, 1 and 0, since there was nothing to lose. Where R is not finite: 0, 0 and infinity.
    """
    DR = DD = RR = EE = 0.0
    pieces = (tensor.reshape(-1).split(CHUNK) for tensor in (D, merged, base))
    for d, new, old in zip(*pieces, strict=True):
        d, r = d.double(), new.double() - old.double()
        e = r - d
        DR, DD, RR, EE = DR + (d @ r).item(), DD + (d @ d).item(), RR + (r @ r).item(), EE + (e @ e).item()
    if DD == 0:
        return 1.0, 1.0, 0.0
    if not math.isfinite(RR):
        return 0.0, 0.0, math.inf
    return DR / DD, (DR / math.sqrt(DD * RR) if RR > 0 else 0.0), math.sqrt(EE / DD)


def _for_json(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if value == math.inf else value for key, value in values.items()}


def _cosine(value: float) -> str:
    """Three digits, or near 1 what is missing."""
    return f"{value:.3f}" if value < 0.9995 else f"1 − {max(1 - value, 0):.0e}"


def _error(value: float) -> str:
    return "overflow" if math.isinf(value) else f"{value:.2g}" if value < 10 else f"{value:.0f}"
