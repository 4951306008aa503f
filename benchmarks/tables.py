"""The speed table as JSON, as Markdown and as a chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cells import CellSettings, Row
from benchmarks.contenders import BASELINE, REFERENCE
from benchmarks.panels import draw_panels
from restyle_deploy.bench.comparison import Ratio
from restyle_deploy.bench.environment import Environment
from restyle_deploy.bench.parsing import parse
from restyle_deploy.files import replace_when_complete

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT_VERSION = 1
EXACT_COLOUR, APPROXIMATE_COLOUR, TORCH_COLOUR = "#0072B2", "#E69F00", "#999999"  # Okabe and Ito's, and a grey
HEADER = (
    "",
    "ms",
    "times as fast as upstream's (quartiles)",
    "opening, s",
    "peak MiB, loading",
    "peak MiB, running",
    "running / bound",
    "PSNR, dB",
    "latent error",
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model at one batch.

    Attributes:
        model: name in the table.
        output_size: side of what it renders.
        batch: images of a call.
        weight_mib, activation_mib: see `memory.ModelMemory`; the activations are one image's.
        rows: one per contender.
    """

    model: str
    output_size: int
    batch: int
    weight_mib: float
    activation_mib: float
    rows: tuple[Row, ...]

    @property
    def bound_mib(self) -> float:
        """Weights and the batch's activations."""
        return self.weight_mib + self.batch * self.activation_mib


@dataclass(frozen=True, kw_only=True)
class SpeedTable:
    """All that was measured.

    Attributes:
        created: UTC, ISO 8601.
        environment: the machine and its software.
        settings: of every cell.
        cells: in the order in which they were measured.
        loop_overhead: a session's time on the demo model over the sum of its runs' times; see `loop_overhead`.
        format_version: of the file.
    """

    created: str
    environment: Environment
    settings: CellSettings
    cells: tuple[Cell, ...]
    loop_overhead: Ratio | None
    format_version: int = FORMAT_VERSION


def write_table(table: SpeedTable, output: Path) -> list[Path]:
    """Write `cpu.json`, `cpu.md` and `cpu.png`; each replaces a former one when it is complete."""
    files = [output / f"cpu.{suffix}" for suffix in ("json", "md", "png")]
    with replace_when_complete(files[0]) as temporary:
        temporary.write_text(json.dumps(asdict(table), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with replace_when_complete(files[1]) as temporary:
        temporary.write_text(format_markdown(table), encoding="utf-8")
    with replace_when_complete(files[2]) as temporary:
        _draw(table, temporary)
    return files


def read_table(output: Path) -> SpeedTable | None:
    """Read the `cpu.json` of a former run; None where there is none of this format."""
    path = output / "cpu.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    problems: list[str] = []
    if content.get("format_version") != FORMAT_VERSION:
        return None
    table: SpeedTable = parse(SpeedTable, content, "table", problems)
    return None if problems else table


def format_markdown(table: SpeedTable) -> str:
    """Return a section per cell, and what the columns mean."""
    environment, settings = table.environment, table.settings
    threads = "each library's own number of" if settings.threads is None else settings.threads
    text = [
        f"{settings.steps} steps, {threads} threads, {environment.cpu}, {table.created[:10]}. Medians of calls that"
        " took turns; ratios are taken within each round. Opening: libraries imported, files in the page cache. Peak"
        " memory is the whole process's, libraries included. Bound: weights and activations, the latter being the"
        " largest set of tensors that are alive together in an exported graph. PSNR (of the last image, the lowest of"
        " the batch) and latent error (the largest) are differences from our model on torch, float32.",
    ]
    for cell in table.cells:
        text.append(
            f"### {_title(cell)}\n\nBound: {cell.weight_mib:.0f} MiB of weights and {cell.activation_mib:.0f} MiB of "
            f"activations per image.\n\n{_format_rows(cell)}"
        )
    if table.loop_overhead is not None:
        ratio = table.loop_overhead
        text.append(
            f"The loop: an inversion with the demo model takes {ratio.median:.2f} times the sum of its ONNX Runtime"
            f" runs (quartiles {ratio.lower_quartile:.2f} to {ratio.upper_quartile:.2f})."
        )
    return "\n\n".join(text) + "\n"


def _title(cell: Cell) -> str:
    name = f"Demo model, {cell.output_size} px" if cell.model == "demo" else f"{cell.output_size} px"
    return f"{name}, batch {cell.batch}"


def _format_rows(cell: Cell) -> str:
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1))]
    lines += [_row_cells(row, cell) for row in cell.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row_cells(row: Row, cell: Cell) -> tuple[str, ...]:
    label = f"{row.label} (approximate)" if row.is_approximate else row.label
    if row.median_ms is None:
        return (label, *["–"] * (len(HEADER) - 2), str(row.reason).replace("|", "/"))
    running = row.run_peak_mib or 0
    return (
        label,
        f"{row.median_ms:.{0 if row.median_ms >= 100 else 1}f}",
        _format_ratio(row),
        _format(row.open_s, 2),
        _format(row.open_peak_mib, 0),
        _format(running, 0),
        f"{running / cell.bound_mib:.2f}",
        *_format_difference(row),
    )


def _format_ratio(row: Row) -> str:
    if row.ratio is None:
        return "–"
    if row.contender == BASELINE:
        return "1"
    return f"{row.ratio.median:.2f} ({row.ratio.lower_quartile:.2f}–{row.ratio.upper_quartile:.2f})"


def _format_difference(row: Row) -> tuple[str, str]:
    if row.difference is None:
        return ("reference", "reference") if row.contender == REFERENCE else ("–", "–")
    psnr_db = row.difference.psnr_db
    return "equal" if psnr_db is None else f"{psnr_db:.1f}", f"{row.difference.latent_error:.1e}"


def _format(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def _draw(table: SpeedTable, path: Path) -> None:
    """Draw bars of the ratios: a column per model, a row per batch."""
    draw_panels(
        table.cells,
        _draw_cell,
        path,
        title=f"Inversion in {table.settings.steps} steps: times as fast as upstream's arithmetic on torch",
        caption=(
            "Bar: median of the rounds' ratios; line: quartiles. Hatched: approximate, with the PSNR of the last image."
            f"\n{table.environment.cpu}, {table.created[:10]}"
        ),
        inches=(3.2, 2.9, 1.2),
        label_points=9,
    )


def _draw_cell(axes: Axes, cell: Cell, names: Sequence[str]) -> None:
    axes.set_title(_title(cell), fontsize=10)
    longest = max((row.ratio.upper_quartile for row in cell.rows if row.ratio), default=1.0)
    for row in cell.rows:
        place = names.index(row.contender)
        if row.ratio is None:
            axes.text(0.02 * longest, place, "not measured", va="center", fontsize=8, style="italic")
            continue
        low, high = row.ratio.median - row.ratio.lower_quartile, row.ratio.upper_quartile - row.ratio.median
        axes.barh(place, row.ratio.median, height=0.7, edgecolor="#222222", linewidth=0.6, **_style(row))
        axes.errorbar(row.ratio.median, place, xerr=np.array([[low], [high]]), color="#222222", capsize=2, linewidth=1)
        shown = f"{row.ratio.median:.1f}×"
        if row.is_approximate and row.difference and row.difference.psnr_db is not None:
            shown += f", {row.difference.psnr_db:.0f} dB"
        axes.text(row.ratio.upper_quartile + 0.02 * longest, place, shown, va="center", fontsize=8)
    axes.axvline(1, color="#222222", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.35 * longest)
    axes.spines[["top", "right"]].set_visible(False)


def _style(row: Row) -> dict[str, Any]:
    if row.is_approximate:
        return {"color": APPROXIMATE_COLOUR, "hatch": "///"}
    is_torch = row.contender.startswith(("upstream", "torch"))
    return {"color": TORCH_COLOUR if is_torch else EXACT_COLOUR}
