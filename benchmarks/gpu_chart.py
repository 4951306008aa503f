"""The GPU's table as a chart: times of a call over the floor, a panel per model and batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_table import MOST_OVER_FLOOR, GpuCell, GpuTable, format_ms, title_of
from benchmarks.tables import APPROXIMATE_COLOUR, CHART_DPI, EXACT_COLOUR, TORCH_COLOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_gpu_table(table: GpuTable, path: Path) -> None:
    """Draw bars on a logarithmic axis: a column per model, a row per batch.

    Args:
        table: with at least one cell.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(cell.model for cell in table.cells))
    batches = list(dict.fromkeys(cell.batch for cell in table.cells))
    labels = list(dict.fromkeys((row.contender, row.label) for cell in table.cells for row in cell.rows))
    figure = Figure(
        figsize=(4.2 + 3.1 * len(models), 1.4 + len(batches) * (0.8 + 0.3 * len(labels))),
        dpi=CHART_DPI,
        layout="constrained",
    )
    figure.suptitle(f"Inversion in {table.settings['steps']} steps: milliseconds of a call")
    panels = figure.subplots(len(batches), len(models), squeeze=False, sharey=True)
    for axes in panels.flat:
        axes.set_visible(False)
    for cell in table.cells:
        axes = panels[batches.index(cell.batch), models.index(cell.model)]
        axes.set_visible(True)
        _draw_cell(axes, cell, [name for name, _ in labels])
        axes.set_yticks(range(len(labels)), [label for _, label in labels], fontsize=8)
    panels[0, 0].set_ylim(len(labels) - 0.5, -0.5)
    figure.supxlabel(
        f"Dotted: the floor of float16, and {MOST_OVER_FLOOR:.0f} times that. Hatched: fp16, bf16 and TF32, with the "
        f"PSNR of the last image.\n{table.device['GPU']}, {table.created[:10]}",
        fontsize=8,
    )
    figure.savefig(path)


def _draw_cell(axes: Axes, cell: GpuCell, names: Sequence[str]) -> None:
    axes.set_title(title_of(cell), fontsize=10)
    axes.set_xscale("log")
    times = [row.median_ms for row in cell.rows if row.reason is None and row.wall_ms]
    axes.set_xlim(min([cell.floor.ms, *times]) / 2, 6 * max([MOST_OVER_FLOOR * cell.floor.ms, *times]))
    for limit in (cell.floor.ms, MOST_OVER_FLOOR * cell.floor.ms):
        axes.axvline(limit, color="#222222", linewidth=0.8, linestyle=":")
    for row in cell.rows:
        place = names.index(row.contender)
        if row.reason is not None or not row.wall_ms:
            axes.text(0.02, place, "not measured", transform=axes.get_yaxis_transform(), va="center", fontsize=7)
            continue
        axes.barh(
            place, row.median_ms, height=0.7, edgecolor="#222222", linewidth=0.6, **_style(row.is_ours, row.precision)
        )
        psnr_db = row.difference.psnr_db if row.difference else None
        quality = f", {psnr_db:.0f} dB" if psnr_db is not None and row.precision != "fp32" else ""
        axes.text(1.08 * row.median_ms, place, f"{format_ms(row.median_ms)} ms{quality}", va="center", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _style(is_ours: bool, precision: str) -> dict[str, Any]:
    if not is_ours:
        return {"color": TORCH_COLOUR, **({} if precision == "fp32" else {"hatch": "///"})}
    return {"color": EXACT_COLOUR} if precision == "fp32" else {"color": APPROXIMATE_COLOUR, "hatch": "///"}
