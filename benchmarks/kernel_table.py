"""What the kernels' benchmark measures, the bytes that must move, and the figures as JSON and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from benchmarks.verdicts import Verdict, format_verdict
from restyle_deploy.bench.environment import Environment
from restyle_deploy.bench.measure import StepLatency
from restyle_deploy.files import replace_when_complete
from restyle_deploy.ops.kernels.launches import ALL_FACTORS, ELEMENT_TYPES, SKIP_PADS, Factor, Filtering

FORMAT_VERSION = 1
OURS, EAGER, COMPILED, SHIFTED, COPY = "ours", "torch", "torch.compile", "torch.compile, shifts", "copy"
CONTENDERS = (OURS, EAGER, COMPILED, SHIFTED, COPY)
LEAST_SHARE = 0.8  # of the copy bandwidth
LEAST_RATIO = 2.0  # torch.compile's time over ours
UP_LAYER = "up-layer"
GOAL_DTYPE = "float16"
IMAGE_CHANNELS = 3
FLOAT32_BYTES = 4
BLUR_FILTERING = Filtering(pads=(1, 1, 1, 1), filter_size=(4, 4), is_separable=True)
SKIP_FILTERING = Filtering(up=(2, 2), pads=SKIP_PADS, filter_size=(4, 4), is_separable=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One use of a kernel in the generator.

    Attributes:
        title: in the table.
        factors: what follows the filter, or the convolution before.
        filtering: None where nothing is filtered.
        is_image: whether it works on the image instead of the feature maps.
    """

    title: str
    factors: Factor
    filtering: Filtering | None = None
    is_image: bool = False


CASES: Mapping[str, Case] = MappingProxyType(
    {
        "bias-act": Case(title="bias, activation", factors=Factor.BIAS | Factor.ACTIVATION),
        "epilogue": Case(title="whole epilogue of a convolution", factors=ALL_FACTORS),
        "blur": Case(title="blur", factors=Factor.NONE, filtering=BLUR_FILTERING),
        UP_LAYER: Case(title="blur and whole epilogue (up-layer)", factors=ALL_FACTORS, filtering=BLUR_FILTERING),
        "skip": Case(title="upsampling of the image", factors=Factor.NONE, filtering=SKIP_FILTERING, is_image=True),
    }
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One case at one size.

    Attributes:
        case: a key of `CASES`.
        size: side of the result.
        batch: images.
        dtype: of x, noise and y.
        channels_last: whether x and y are [N, H, W, C] in memory.
    """

    case: str
    size: int
    batch: int
    dtype: str
    channels_last: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, C, H, W] of x: as many channels as the official generator has at this size."""
        case = CASES[self.case]
        channels = IMAGE_CHANNELS if case.is_image else min(512, 32768 // self.size)
        side = self.size
        if case.filtering is BLUR_FILTERING:
            side += 1  # what the transposed convolution gives
        if case.filtering is SKIP_FILTERING:
            side //= 2
        return self.batch, channels, side, side

    @property
    def bytes_moved(self) -> int:
        """What must move at least: each input is read once, and y written once."""
        batch, channels, height, width = self.shape
        case, item_bytes = CASES[self.case], ELEMENT_TYPES[self.dtype].item_bytes
        pixels = self.size * self.size
        elements = batch * channels * (height * width + pixels)
        floats = 0
        if case.filtering is not None:
            floats += case.filtering.filter_size[0] * case.filtering.filter_size[1]
        if Factor.NOISE in case.factors:
            elements += pixels
        if Factor.BIAS in case.factors:
            floats += channels
        floats += batch * channels * sum(factor in case.factors for factor in (Factor.DEMOD, Factor.NEXT_SCALE))
        return elements * item_bytes + floats * FLOAT32_BYTES


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """The figures of a problem.

    Attributes:
        problem: what was computed.
        bytes_moved: see `Problem`.
        copy_bandwidth: bytes read and written per second by a large copy, in the same rounds.
        latencies: by contender, one call on buffers that are in no cache; COPY moves as many bytes as must move.
        errors: by contender, ‖y − reference‖ / ‖reference‖.
        reasons: by contender, why it has no figures.
    """

    problem: Problem
    bytes_moved: int
    copy_bandwidth: float
    latencies: Mapping[str, StepLatency]
    errors: Mapping[str, float]
    reasons: Mapping[str, str]

    @property
    def floor_ms(self) -> float:
        """The bytes over the copy bandwidth."""
        return self.bytes_moved / self.copy_bandwidth * 1e3

    def share(self, contender: str) -> float | None:
        """Return the floor over a contender's time."""
        latency = self.latencies.get(contender)
        return None if latency is None else self.floor_ms / latency.median_ms

    def ratio(self, contender: str) -> float | None:
        """Return a contender's time over ours."""
        ours, other = self.latencies.get(OURS), self.latencies.get(contender)
        return None if ours is None or other is None else other.median_ms / ours.median_ms


@dataclass(frozen=True, kw_only=True)
class KernelTable:
    """All that was measured.

    Attributes:
        created: UTC, ISO 8601.
        environment: the machine and its software.
        device: the GPU's facts, as text.
        rows: in the order in which they were measured.
        format_version: of the file.
    """

    created: str
    environment: Environment
    device: Mapping[str, str]
    rows: tuple[KernelRow, ...]
    format_version: int = FORMAT_VERSION


def verdicts_of(rows: Sequence[KernelRow]) -> list[Verdict]:
    """Return the goals for float16: the share of the copy bandwidth, and the up-layer against torch.compile."""
    verdicts = []
    for row in rows:
        if row.problem.dtype != GOAL_DTYPE:
            continue
        name = describe(row.problem)
        verdicts.append(Verdict(goal=f"{name}: share of the copy", figure=row.share(OURS), least=LEAST_SHARE))
        if row.problem.case == UP_LAYER:
            verdicts.append(Verdict(goal=f"{name}: times torch.compile", figure=row.ratio(COMPILED), least=LEAST_RATIO))
    return verdicts


def describe(problem: Problem) -> str:
    """Return a problem in a few words."""
    layout = "channels last" if problem.channels_last else "NCHW"
    return f"{CASES[problem.case].title}, {problem.size} px, batch {problem.batch}, {problem.dtype}, {layout}"


def format_markdown(table: KernelTable) -> str:
    """Return the table, the goals and what the columns mean."""
    device = ", ".join(f"{name} {fact}" for name, fact in table.device.items())
    others = [contender for contender in CONTENDERS if contender not in (OURS, COPY)]
    titles = [
        "",
        "floor, ms",
        "ours, ms",
        "share of the copy",
        "of a copy of its size",
        *(f"{x} / ours" for x in others),
    ]
    lines = [
        f"{device}; {table.created[:10]}. Medians of calls that took turns, on buffers that rotate through more memory "
        "than the caches hold. Floor: the bytes that must move, over the bandwidth of a large copy in the same rounds. "
        "`torch` is eager; `shifts` is the filter written as sixteen shifted sums, which torch.compile fuses with "
        "the rest. ± marks an interquartile range above a tenth of the median.",
        "",
        "| " + " | ".join(titles) + " |",
        "|---|" + "---:|" * (len(titles) - 1),
        *(_format_row(row, others) for row in table.rows),
        "",
        *(f"- {format_verdict(verdict)}" for verdict in verdicts_of(table.rows)),
    ]
    return "\n".join(lines) + "\n"


def write_table(table: KernelTable, results: Path) -> list[Path]:
    """Write `<device>/kernels.json` and `.md`; each replaces a former one when it is complete."""
    folder = results / device_folder(table.device["GPU"])
    files = [folder / "kernels.json", folder / "kernels.md"]
    with replace_when_complete(files[0]) as temporary:
        temporary.write_text(json.dumps(asdict(table), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with replace_when_complete(files[1]) as temporary:
        temporary.write_text(format_markdown(table), encoding="utf-8")
    return files


def device_folder(name: str) -> str:
    """Return a GPU's name as that of a folder: "NVIDIA H200" gives "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _format_row(row: KernelRow, others: Sequence[str]) -> str:
    copy, ours = row.ratio(COPY), row.latencies.get(OURS)
    cells = [
        describe(row.problem),
        f"{row.floor_ms:.4f}",
        row.reasons.get(OURS, "–") if ours is None else f"{ours.median_ms:.4f}{' ±' if ours.unstable else ''}",
        _format_figure(row.share(OURS), "{:.0%}"),
        _format_figure(copy, "{:.0%}"),
        *(_format_figure(row.ratio(contender), "{:.2f}") for contender in others),
    ]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _format_figure(figure: float | None, form: str) -> str:
    return "–" if figure is None else form.format(figure)
