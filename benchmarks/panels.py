"""A chart of bars: a panel per model and batch, a bar per contender, the contenders in the same places everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHART_DPI = 150


class PanelCell(Protocol):
    """One model at one batch, with a row per contender that has `contender` (its name) and `label`."""

    @property
    def model(self) -> str:
        """Name of the model: a column."""
        ...

    @property
    def batch(self) -> int:
        """Images of a call: a row."""
        ...

    @property
    def rows(self) -> Sequence[Any]:
        """The contenders."""
        ...


SomeCell = TypeVar("SomeCell", bound=PanelCell)


def draw_panels(
    cells: Sequence[SomeCell],
    draw_cell: Callable[[Axes, SomeCell, Sequence[str]], None],
    path: Path,
    *,
    title: str,
    caption: str,
    inches: tuple[float, float, float],
    label_points: float,
) -> None:
    """Draw a column per model and a row per batch; what was not measured stays empty.

    Args:
        cells: at least one.
        draw_cell: draws a panel; it is told the names of the contenders, whose indices are the places of the bars.
        path: of the picture.
        title, caption: above and below.
        inches: width of the labels, width of a column, height beside the panels.
        label_points: size of the contenders' labels.
    """
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(cell.model for cell in cells))
    batches = list(dict.fromkeys(cell.batch for cell in cells))
    labels = list(dict.fromkeys((row.contender, row.label) for cell in cells for row in cell.rows))
    margin, column, above = inches
    figure = Figure(
        figsize=(margin + column * len(models), above + len(batches) * (0.8 + 0.3 * len(labels))),
        dpi=CHART_DPI,
        layout="constrained",
    )
    figure.suptitle(title)
    panels = figure.subplots(len(batches), len(models), squeeze=False, sharey=True)
    for axes in panels.flat:
        axes.set_visible(False)
    for cell in cells:
        axes = panels[batches.index(cell.batch), models.index(cell.model)]
        axes.set_visible(True)
        draw_cell(axes, cell, [name for name, _ in labels])
        axes.set_yticks(range(len(labels)), [label for _, label in labels], fontsize=label_points)
    panels[0, 0].set_ylim(len(labels) - 0.5, -0.5)
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path)
