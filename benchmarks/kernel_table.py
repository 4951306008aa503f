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

FORMAT_VERSION = 2
OURS, EAGER, COMPILED, SHIFTED = "ours", "torch", "torch.compile", "torch.compile, shifts"
CONTENDERS = (OURS, EAGER, COMPILED, SHIFTED)
LEAST_SHARE = 0.8  # of a copy's bandwidth
LEAST_RATIO = 2.0  # the faster torch.compile's time over ours
COPY_GOAL = "share of a copy of as many bytes, by which kernels are judged"
FLOOR_GOAL = "share of the memory floor (a large copy's bandwidth)"
COMPILED_GOAL = "up-layer against the faster of torch.compile's two forms"
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
class Copies:
    """Copies of so many bytes, made in several ways in the same rounds as the contenders' calls.

    Attributes:
        bytes_moved: read and written together.
        latencies: by way, one copy between buffers that are in no cache.
        fastest: the way with the least median, which is the reference.
    """

    bytes_moved: int
    latencies: Mapping[str, StepLatency]
    fastest: str

    @property
    def median_ms(self) -> float:
        """Of the fastest way."""
        return self.latencies[self.fastest].median_ms

    @property
    def bandwidth(self) -> float:
        """Bytes read and written per second, by the fastest way."""
        return self.bytes_moved / (self.median_ms / 1e3)


def copies_from(bytes_moved: int, latencies: Mapping[str, StepLatency]) -> Copies:
    """Choose the fastest way; there is at least one."""
    fastest = min(latencies, key=lambda way: latencies[way].median_ms)
    return Copies(bytes_moved=bytes_moved, latencies=latencies, fastest=fastest)


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """The figures of a problem.

    Attributes:
        problem: what was computed.
        bytes_moved: see `Problem`.
        equal_copy: of as many bytes.
        large_copy: of so many that starting it takes no part of its time.
        latencies: by contender, one call on buffers that are in no cache.
        errors: by contender, ‖y − reference‖ / ‖reference‖.
        reasons: by contender, why it has no figures.
    """

    problem: Problem
    bytes_moved: int
    equal_copy: Copies
    large_copy: Copies
    latencies: Mapping[str, StepLatency]
    errors: Mapping[str, float]
    reasons: Mapping[str, str]

    @property
    def floor_ms(self) -> float:
        """The bytes over the large copy's bandwidth."""
        return self.bytes_moved / self.large_copy.bandwidth * 1e3

    @property
    def share_of_floor(self) -> float | None:
        """The floor over our time."""
        ours = self.latencies.get(OURS)
        return None if ours is None else self.floor_ms / ours.median_ms

    @property
    def share_of_copy(self) -> float | None:
        """The time of a copy of as many bytes over ours."""
        ours = self.latencies.get(OURS)
        return None if ours is None else self.equal_copy.median_ms / ours.median_ms

    def ratio(self, contender: str) -> float | None:
        """Return a contender's time over ours."""
        ours, other = self.latencies.get(OURS), self.latencies.get(contender)
        return None if ours is None or other is None else other.median_ms / ours.median_ms

    @property
    def faster_compiled(self) -> str:
        """The faster of the forms that torch.compile was given, of those that were measured."""
        measured = [contender for contender in (COMPILED, SHIFTED) if contender in self.latencies]
        return min(measured, key=lambda contender: self.latencies[contender].median_ms, default=COMPILED)


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


def verdicts_of(rows: Sequence[KernelRow]) -> dict[str, list[Verdict]]:
    """Return the verdicts for float16, by goal.

    COPY_GOAL judges the kernels: in a call of few microseconds, starting the kernel, filling the GPU and draining it
    take a share that no kernel avoids; a copy of as many bytes has it as well, and the floor does not.
    """
    verdicts: dict[str, list[Verdict]] = {COPY_GOAL: [], FLOOR_GOAL: [], COMPILED_GOAL: []}
    for row in rows:
        if row.problem.dtype != GOAL_DTYPE:
            continue
        name = describe(row.problem)
        for goal, words, figure in (
            (COPY_GOAL, "share of a copy of as many bytes", row.share_of_copy),
            (FLOOR_GOAL, "share of the memory floor", row.share_of_floor),
        ):
            verdicts[goal].append(Verdict(goal=f"{name}: {words}", figure=figure, least=LEAST_SHARE))
        if row.problem.case == UP_LAYER:
            other = row.faster_compiled
            verdict = Verdict(goal=f"{name}: times {other}", figure=row.ratio(other), least=LEAST_RATIO)
            verdicts[COMPILED_GOAL].append(verdict)
    return verdicts


def describe(problem: Problem) -> str:
    """Return a problem in a few words."""
    layout = "channels last" if problem.channels_last else "NCHW"
    return f"{CASES[problem.case].title}, {problem.size} px, batch {problem.batch}, {problem.dtype}, {layout}"


def format_markdown(table: KernelTable) -> str:
    """Return the table, the goals and what the columns mean."""
    device = ", ".join(f"{name} {fact}" for name, fact in table.device.items())
    others = [contender for contender in CONTENDERS if contender != OURS]
    titles = [
        "",
        "floor, ms",
        "copy of as many bytes, ms",
        "ours, ms",
        "share of the floor",
        "share of the copy",
        *(f"{x} / ours" for x in others),
    ]
    lines = [
        f"{device}; {table.created[:10]}. Medians of calls that took turns, on buffers that rotate through more memory "
        "than the caches hold. Floor: the bytes that must move, over the bandwidth of a large copy in the same rounds. "
        "Each copy is the faster of a memcpy and an elementwise kernel; brackets name it. "
        f"The goal of {LEAST_SHARE:.0%} is judged by the copy of as many bytes: starting, filling and draining the GPU "
        "take a part of a short call that no kernel avoids, which that copy has as well and the floor does not; the "
        "verdicts by the floor are below too. "
        "`torch` is eager; `shifts` is the filter written as sixteen shifted sums, which torch.compile fuses with "
        "the rest; the up-layer's goal takes the faster of the two compiled forms. ± marks a time that is not to "
        "be relied on; kernels.json says why.",
        "",
        "| " + " | ".join(titles) + " |",
        "|---|" + "---:|" * (len(titles) - 1),
        *(_format_row(row, others) for row in table.rows),
        "",
        *_format_verdicts(table.rows),
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


def _format_verdicts(rows: Sequence[KernelRow]) -> list[str]:
    """Return lines of Markdown: for each goal how often it is reached, and each of its verdicts."""
    lines = []
    for goal, verdicts in verdicts_of(rows).items():
        reached = sum(verdict.is_reached for verdict in verdicts)
        lines.append(f"- {goal}: reached by {reached} of {len(verdicts)}")
        lines += [f"  - {format_verdict(verdict)}" for verdict in verdicts]
    return lines


def _format_row(row: KernelRow, others: Sequence[str]) -> str:
    ours = row.latencies.get(OURS)
    cells = [
        describe(row.problem),
        _format_copy(row.floor_ms, row.large_copy),
        _format_copy(row.equal_copy.median_ms, row.equal_copy),
        row.reasons.get(OURS, "–") if ours is None else f"{ours.median_ms:.4f}{' ±' if ours.unstable else ''}",
        _format_figure(row.share_of_floor, "{:.0%}"),
        _format_figure(row.share_of_copy, "{:.0%}"),
        *(_format_ratio(row, contender) for contender in others),
    ]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _format_copy(ms: float, copies: Copies) -> str:
    unstable = " ±" if copies.latencies[copies.fastest].unstable else ""
    return f"{ms:.4f}{unstable} ({copies.fastest})"


def _format_ratio(row: KernelRow, contender: str) -> str:
    latency = row.latencies.get(contender)
    is_unstable = latency is not None and latency.unstable
    return _format_figure(row.ratio(contender), "{:.2f} ±" if is_unstable else "{:.2f}")


def _format_figure(figure: float | None, form: str) -> str:
    return "–" if figure is None else form.format(figure)
