"""One cell of the speed table: the contenders of one model at one batch, call by call in turn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import BASELINE, CONTENDERS, REFERENCE, Contender, ModelFiles
from benchmarks.worker import Worker, WorkerError
from restyle_deploy.bench.comparison import Difference, Ratio, difference_of, ratio_from_samples
from restyle_deploy.runtime.session import InversionResult

# A contender that is about to be opened is taken to need no more memory than so many times the baseline's peak.
NEXT_OVER_BASELINE = 1.5


@dataclass(frozen=True, kw_only=True)
class CellSettings:
    """How a cell is measured.

    Attributes:
        steps: refinement steps of a call.
        threads: of each contender; None leaves the choice to its library.
        rounds: measured calls of each contender, unless the time runs out.
        fewest_rounds: that are measured even then.
        seconds: after so long, a group of contenders starts no other round.
        memory_mib: of all processes together; contenders that do not fit beside the others are measured in groups,
            each with the baseline.
    """

    steps: int
    threads: int | None
    rounds: int
    fewest_rounds: int
    seconds: float
    memory_mib: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one model and batch. Where it could not run, `reason` says why and the rest is `None` or empty.

    Attributes:
        contender, label, is_approximate: as in `contenders.CONTENDERS`.
        reason: why there are no figures.
        samples_ms: of each measured call.
        baseline_ms: of the baseline's calls in the same rounds.
        ratio: the baseline's time over this one's, round by round.
        first_call_ms: of the call before the measured ones.
        import_s, open_s: seconds to import the libraries, and to load the model with its files in the page cache.
        base_mib: resident with the libraries and without the model.
        open_peak_mib, run_peak_mib: most memory while the model was loaded, and during all calls.
        difference: of the last images and latents from the float32 reference.
    """

    contender: str
    label: str
    is_approximate: bool
    reason: str | None = None
    samples_ms: tuple[float, ...] = ()
    baseline_ms: tuple[float, ...] = ()
    ratio: Ratio | None = None
    first_call_ms: float | None = None
    import_s: float | None = None
    open_s: float | None = None
    base_mib: float | None = None
    open_peak_mib: float | None = None
    run_peak_mib: float | None = None
    difference: Difference | None = None

    @property
    def median_ms(self) -> float | None:
        """Median of the samples."""
        return float(np.median(self.samples_ms)) if self.samples_ms else None


@dataclass(kw_only=True)
class _Entry:
    """A contender while the cell is measured."""

    contender: Contender
    worker: Worker
    results: Path
    opening: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    first_call_ms: float | None = None
    samples_ms: list[float] = field(default_factory=list)
    baseline_ms: list[float] = field(default_factory=list)
    reason: str | None = None

    def attempt(self, work: Callable[[], Any]) -> Any:
        """Return what the work gives; if the contender fails, keep the reason, end its process and return None."""
        try:
            return work()
        except WorkerError as error:
            self.reason = str(error)
            self.worker.close()
            return None


def measure_cell(
    files: ModelFiles,
    inputs: NDArray[np.uint8],
    contenders: Sequence[Contender],
    settings: CellSettings,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Row, ...]:
    """Measure contenders on one batch; the baseline and the reference take part in any case.

    Each lives in a process of its own and is called once before it counts. Every round calls each of a group once, the
    others idle; the next round starts with another one.

    Args:
        files: the model.
        inputs: uint8 [N, H, W, 3] of the encoder's size: the batch.
        contenders: rows of the table.
        settings: see there.
        progress: told in a few words what begins.
    Returns:
        A row per contender, in the table's order.
    """
    chosen = {BASELINE, REFERENCE, *(contender.name for contender in contenders)}
    others = [row for row in CONTENDERS.values() if row.name in chosen and row.name != BASELINE]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        np.save(Path(folder) / "inputs.npy", inputs)

        def start(contender: Contender) -> _Entry:
            progress(f"{contender.label}: opening")
            entry = _start(contender, files, Path(folder), settings)
            stack.callback(entry.worker.close)
            return entry

        baseline = start(CONTENDERS[BASELINE])
        entries, group = [baseline], [baseline]
        for contender in others:
            if not _fits_another(group, settings.memory_mib):
                _measure_group(group, settings, progress)
                for entry in group[1:]:
                    entry.worker.close()
                group = [baseline]
            entry = start(contender)
            entries.append(entry)
            if entry.reason is None:
                group.append(entry)
        _measure_group(group, settings, progress)
        reference = next((entry.results for entry in entries if entry.contender.name == REFERENCE), None)
        rows = {entry.contender.name: _row(entry, reference) for entry in entries}
    return tuple(rows[name] for name in CONTENDERS if name in rows)


def _start(contender: Contender, files: ModelFiles, folder: Path, settings: CellSettings) -> _Entry:
    """Open a contender, call it once and keep its results."""
    _read_files(files)
    worker = Worker(
        contender,
        files,
        folder / "inputs.npy",
        steps=settings.steps,
        threads=settings.threads,
        log=folder / f"{contender.name}.log",
    )
    entry = _Entry(contender=contender, worker=worker, results=folder / f"{contender.name}.npz")

    def prepare() -> None:
        entry.opening = worker.open()
        entry.first_call_ms = worker.call(entry.results)
        entry.memory = worker.memory()

    entry.attempt(prepare)
    return entry


def _read_files(files: ModelFiles) -> None:
    """Read a model's files once, so that the page cache holds them when the opening is timed."""
    paths = [path for path in files.bundle.rglob("*") if path.is_file()]
    for path in [*paths, files.checkpoint] if files.checkpoint else paths:
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def _fits_another(group: Sequence[_Entry], memory_mib: float) -> bool:
    """Whether another contender may be opened beside those: all keep what is resident, one at a time needs more."""
    living = [entry.memory for entry in group if entry.reason is None and entry.memory]
    if not living:
        return True
    resident = sum(memory["resident_mib"] for memory in living)
    largest = max(memory["peak_mib"] - memory["resident_mib"] for memory in living)
    return resident + max(largest, NEXT_OVER_BASELINE * living[0]["peak_mib"]) <= memory_mib


def _measure_group(group: list[_Entry], settings: CellSettings, progress: Callable[[str], None]) -> None:
    """Call each once a round, until the rounds are done or the time is up; who fails leaves the group."""
    if len(group) == 1 and group[0].samples_ms:  # the baseline alone, which has been measured
        return
    begin = time.monotonic()
    for turn in range(settings.rounds):
        if turn >= settings.fewest_rounds and time.monotonic() - begin > settings.seconds:
            break
        living = [entry for entry in group if entry.reason is None]
        progress(f"round {turn + 1}: {', '.join(entry.contender.name for entry in living)}")
        first = turn % max(1, len(living))
        times = {entry.contender.name: entry.attempt(entry.worker.call) for entry in living[first:] + living[:first]}
        for entry in living:
            ms, baseline_ms = times[entry.contender.name], times.get(BASELINE)
            if ms is not None:
                entry.samples_ms.append(ms)
                entry.baseline_ms.append(np.nan if baseline_ms is None else baseline_ms)
    for entry in group:
        if entry.reason is None:
            entry.memory = entry.attempt(entry.worker.memory) or entry.memory


def _row(entry: _Entry, reference: Path | None) -> Row:
    contender = entry.contender
    row = Row(contender=contender.name, label=contender.label, is_approximate=contender.is_approximate)
    if entry.reason is not None or not entry.samples_ms:
        return replace(row, reason=entry.reason or "it was not measured")
    known = bool(np.isfinite(entry.baseline_ms).all())
    return replace(
        row,
        samples_ms=tuple(entry.samples_ms),
        baseline_ms=tuple(entry.baseline_ms) if known else (),
        ratio=ratio_from_samples(entry.baseline_ms, entry.samples_ms) if known else None,
        first_call_ms=entry.first_call_ms,
        import_s=entry.opening["import_s"],
        open_s=entry.opening["open_s"],
        base_mib=entry.opening["base_mib"],
        open_peak_mib=entry.opening["peak_mib"],
        run_peak_mib=entry.memory["peak_mib"],
        difference=_difference(entry.results, reference),
    )


def _difference(results: Path, reference: Path | None) -> Difference | None:
    """Return the difference from the reference; None where that could not run, or is this contender."""
    if reference is None or not reference.is_file() or results == reference:
        return None
    with np.load(results) as found, np.load(reference) as expected:
        return difference_of(InversionResult(**found), InversionResult(**expected))
