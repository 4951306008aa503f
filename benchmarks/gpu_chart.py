"""The GPU's table as a chart: times of a call over the floor, a panel per model and batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_table import MOST_OVER_FLOOR, GpuCell, GpuTable, format_ms, title_of
from benchmarks.panels import draw_panels
from benchmarks.tables import APPROXIMATE_COLOUR, EXACT_COLOUR, TORCH_COLOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_gpu_table(table: GpuTable, path: Path) -> None:
    """Draw bars on a logarithmic axis: a column per model, a row per batch.

    Args:
        table: with at least one cell.
        path: of the picture.
    """
    draw_panels(
        table.cells,
        _draw_cell,
        path,
        title=f"Inversion in {table.settings['steps']} steps: milliseconds of a call",
        caption=(
            f"Dotted: the floor of float16, and {MOST_OVER_FLOOR:.0f} times that. Hatched: fp16, bf16 and TF32, with "
            f"the PSNR of the last image.\n{table.device['GPU']}, {table.created[:10]}"
        ),
        inches=(4.2, 3.1, 1.4),
        label_points=8,
    )


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
