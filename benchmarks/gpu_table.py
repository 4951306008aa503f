"""The GPU's table: its rows, the goals, and the figures as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_floor import DeviceRates, Floor
from benchmarks.kernel_table import device_folder
from benchmarks.verdicts import Verdict, format_verdict
from restyle_deploy.bench.comparison import Difference
from restyle_deploy.bench.environment import Environment
from restyle_deploy.files import replace_when_complete

FORMAT_VERSION = 1
# Between two ways to compute the same in float32, after five steps.
EXACT_ERROR = 5e-3
# The goals: of the fastest of ours in fp16, at this model and batch.
GOAL_MODEL, GOAL_BATCH, GOAL_PRECISION = "1024", 1, "fp16"
MOST_LATENT_ERROR, LEAST_PSNR_DB = 2e-2, 45.0
LEAST_OVER_UPSTREAM, LEAST_OVER_COMPILED, MOST_OVER_FLOOR = 10.0, 1.5, 4.0
MOST_HOST_US = 100.0
MOST_DEVICE_GROWTH_MIB = 0.0
# Pages that an allocator touches late are no leak; one of a kilobyte a call would be 10 MiB.
MOST_HOST_GROWTH_MIB = 4.0
UPSTREAM, COMPILED = "upstream", ("torch-compile", "torch-compile-graph")
HEADER = (
    "",
    "GPU, ms",
    "wall, ms",
    "host, µs",
    "images/s",
    "times upstream's",
    "of the floor",
    "PSNR, dB",
    "latent error",
    "peak device MiB",
    "opening, s",
)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Memory that many calls took and did not give back.

    Attributes:
        calls: how many.
        device_mib: of the device; None without a GPU.
        host_mib: of the process.
    """

    calls: int
    device_mib: float | None
    host_mib: float


@dataclass(frozen=True, kw_only=True)
class GpuRow:
    """One contender at one model and batch. Where it could not run, `reason` says why and the rest is empty.

    Attributes:
        contender, label, precision, is_ours: as in `gpu_contenders.GPU_CONTENDERS`.
        reason: why there are no figures.
        gpu_ms, wall_ms, host_us: of each measured call, see `gpu_worker.CallTimes`.
        device_mib: the most memory of the device that model, libraries and calls have held, without the context.
        open_s: seconds to load the model.
        difference: of the last images and latents from upstream's arithmetic in float32; None for that itself.
        growth: of the contender that was called many times.
    """

    contender: str
    label: str
    precision: str
    is_ours: bool
    reason: str | None = None
    gpu_ms: tuple[float, ...] = ()
    wall_ms: tuple[float, ...] = ()
    host_us: tuple[float, ...] = ()
    device_mib: float | None = None
    open_s: float | None = None
    difference: Difference | None = None
    growth: Growth | None = None

    @property
    def median_ms(self) -> float:
        """Median time of a call: on the GPU, or by the wall where there is none; infinite without figures."""
        samples = self.gpu_ms or self.wall_ms
        return median(samples) if samples else float("inf")

    @property
    def is_good(self) -> bool:
        """Whether its quality is what is asked of an approximation."""
        difference = self.difference
        return difference is not None and (
            difference.latent_error <= MOST_LATENT_ERROR
            and (difference.psnr_db is None or difference.psnr_db >= LEAST_PSNR_DB)
        )


@dataclass(frozen=True, kw_only=True)
class GpuCell:
    """One model at one batch.

    Attributes:
        model: name in the table.
        output_size: side of what it renders.
        batch: images of a call.
        floor: of a call in float16.
        rows: one per contender.
    """

    model: str
    output_size: int
    batch: int
    floor: Floor
    rows: tuple[GpuRow, ...]

    def row(self, *contenders: str) -> GpuRow | None:
        """Return the fastest of the contenders that have figures, or None."""
        rows = [row for row in self.rows if row.contender in contenders and row.reason is None and row.wall_ms]
        return min(rows, key=lambda row: row.median_ms, default=None)

    @property
    def goal_row(self) -> GpuRow | None:
        """The fastest of ours in the goals' precision, of those with the quality asked for if there are any."""
        names = [row.contender for row in self.rows if row.is_ours and row.precision == GOAL_PRECISION]
        good = [row.contender for row in self.rows if row.contender in names and row.is_good]
        return self.row(*(good or names))


@dataclass(frozen=True, kw_only=True)
class GpuTable:
    """All that was measured.

    Attributes:
        created: UTC, ISO 8601.
        environment: the machine and its software.
        device: the GPU's facts, as text.
        rates: that the device reaches, measured in the same run.
        settings: of every cell.
        cells: in the order in which they were measured.
        format_version: of the file.
    """

    created: str
    environment: Environment
    device: Mapping[str, str]
    rates: DeviceRates
    settings: Mapping[str, Any]
    cells: tuple[GpuCell, ...]
    format_version: int = FORMAT_VERSION


def verdicts_of(cells: Sequence[GpuCell]) -> list[Verdict]:
    """Return the goals; a figure that was not measured is none that reaches its goal."""
    found = [cell for cell in cells if (cell.model, cell.batch) == (GOAL_MODEL, GOAL_BATCH)]
    cell = found[0] if found else None
    row = cell.goal_row if cell else None
    where = f"{GOAL_MODEL} px, batch {GOAL_BATCH}, {GOAL_PRECISION}"
    where += f" ({row.label})" if row else ""
    difference = row.difference if row else None
    psnr_db = None if difference is None else float("inf") if difference.psnr_db is None else difference.psnr_db
    growth = row.growth if row else None
    figures: list[tuple[str, float | None, dict[str, Any]]] = [
        ("latent error", difference.latent_error if difference else None, {"most": MOST_LATENT_ERROR}),
        ("PSNR of the last image", psnr_db, {"least": LEAST_PSNR_DB, "unit": "dB"}),
        ("times upstream's arithmetic, eager float32", _ratio(cell, row, UPSTREAM), {"least": LEAST_OVER_UPSTREAM}),
        ("times torch.compile in fp16", _ratio(cell, row, *COMPILED), {"least": LEAST_OVER_COMPILED}),
        ("of the floor", row.median_ms / cell.floor.ms if cell and row else None, {"most": MOST_OVER_FLOOR}),
        (
            "host time of a call",
            median(row.host_us) if row and row.host_us else None,
            {"most": MOST_HOST_US, "unit": "µs"},
        ),
    ]
    calls = growth.calls if growth else 0
    for side, grown, most in (
        ("device", growth.device_mib if growth else None, MOST_DEVICE_GROWTH_MIB),
        ("host", growth.host_mib if growth else None, MOST_HOST_GROWTH_MIB),
    ):
        figures.append((f"growth of the {side}'s memory in {calls} calls", grown, {"most": most, "unit": "MiB"}))
    return [Verdict(goal=f"{where}: {goal}", figure=figure, **limits) for goal, figure, limits in figures]


def write_gpu_table(table: GpuTable, results: Path) -> list[Path]:
    """Write `<device>/report.json`, `.md` and `chart.png`; each replaces a former one when it is complete."""
    from benchmarks.gpu_chart import draw_gpu_table

    folder = results / device_folder(table.device["GPU"])
    files = [folder / name for name in ("report.json", "report.md", "chart.png")]
    content = {**asdict(table), "verdicts": [{**asdict(v), "reached": v.is_reached} for v in verdicts_of(table.cells)]}
    for verdict in content["verdicts"]:
        if verdict["figure"] == float("inf"):
            verdict["figure"] = None  # equal images; JSON has no infinity
    with replace_when_complete(files[0]) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with replace_when_complete(files[1]) as temporary:
        temporary.write_text(format_gpu_table(table), encoding="utf-8")
    with replace_when_complete(files[2]) as temporary:
        draw_gpu_table(table, temporary)
    return files


def _ratio(cell: GpuCell | None, row: GpuRow | None, *others: str) -> float | None:
    """Return the time of the fastest of the others over that of a row."""
    other = cell.row(*others) if cell else None
    return None if other is None or row is None else other.median_ms / row.median_ms


def format_gpu_table(table: GpuTable) -> str:
    """Return a section per cell, what the columns mean, and the goals."""
    device = ", ".join(f"{name} {fact}" for name, fact in table.device.items())
    rates = table.rates
    text = [
        f"{device}; {table.created[:10]}. {table.settings['steps']} steps, medians of calls that took turns, inputs on "
        "the device. GPU: from the caller's stream to where results can be read on it, by events; wall: until the host "
        "knows; host: until the call returns. Floor: convolutions and linear layers in float16, each at the rate of a "
        f"large product ({rates.flop_per_s / 1e12:.3g} TFLOP/s here) or of a large copy "
        f"({rates.copy_bytes_per_s / 1e12:.3g} TB/s), whichever is longer. PSNR (of the last image, the lowest of the "
        "batch) and latent error (the largest) are differences from upstream's arithmetic in float32 in the same run. "
        "Device MiB: what model, libraries and calls hold, without the context.",
    ]
    for cell in table.cells:
        floor = cell.floor
        text.append(
            f"### {title_of(cell)}\n\nFloor {format_ms(floor.ms)} ms: {floor.flop / 1e9:.0f} GFLOP alone take "
            f"{format_ms(floor.arithmetic_ms)} ms, {floor.bytes_moved / 2**20:.0f} MiB alone "
            f"{format_ms(floor.traffic_ms)} ms.\n\n"
            + "\n".join(f"| {' | '.join(line)} |" for line in _lines(cell))
            + "".join(f"\n\n{_format_growth(row)}" for row in cell.rows if row.growth)
        )
    text.append("\n".join(f"- {format_verdict(verdict)}" for verdict in verdicts_of(table.cells)))
    return "\n\n".join(text) + "\n"


def format_ms(ms: float) -> str:
    """Return milliseconds in three digits or more."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def title_of(cell: GpuCell) -> str:
    """Return a cell's title."""
    name = f"Demo model, {cell.output_size} px" if cell.model == "demo" else f"{cell.output_size} px"
    return f"{name}, batch {cell.batch}"


def _lines(cell: GpuCell) -> list[tuple[str, ...]]:
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1))]
    for row in cell.rows:
        if row.reason is not None:
            lines.append((row.label, *["–"] * (len(HEADER) - 2), row.reason.replace("|", "/")))
            continue
        difference = row.difference
        lines.append(
            (
                row.label,
                _median(row.gpu_ms, 3),
                _median(row.wall_ms, 3),
                _median(row.host_us, 0),
                _figure(cell.batch / row.median_ms * 1e3, 1),
                _figure(_ratio(cell, row, UPSTREAM), 2),
                _figure(row.median_ms / cell.floor.ms, 2),
                "reference" if difference is None else _psnr(difference),
                "reference" if difference is None else f"{difference.latent_error:.1e}",
                _figure(row.device_mib, 0),
                _figure(row.open_s, 1),
            )
        )
    return lines


def _format_growth(row: GpuRow) -> str:
    growth = row.growth
    assert growth is not None
    device = "" if growth.device_mib is None else f"{growth.device_mib:.2f} MiB of the device and "
    return (
        f"After {growth.calls} calls, {row.label} held {device}{growth.host_mib:.2f} MiB of the host more than before."
    )


def _psnr(difference: Difference) -> str:
    return "equal" if difference.psnr_db is None else f"{difference.psnr_db:.1f}"


def _median(samples: Sequence[float], decimals: int) -> str:
    return _figure(median(samples) if samples else None, decimals)


def _figure(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"
