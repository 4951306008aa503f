"""One cell of the GPU's table: the contenders of one model at one batch, in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import ModelFiles
from benchmarks.gpu_contenders import BASELINE, GPU_CONTENDERS, GpuContender
from benchmarks.gpu_table import EXACT_ERROR, GpuRow
from benchmarks.gpu_worker import CallTimes, GpuWorker
from benchmarks.processes import WorkerError
from restyle_deploy.bench.comparison import difference_of
from restyle_deploy.runtime.session import InversionResult

# Calls before the measured ones: libraries compile, measure their ways and allocate.
WARM_UP_CALLS = 3


@dataclass(frozen=True, kw_only=True)
class GpuSettings:
    """How cells are measured.

    Attributes:
        device: `cuda:0` and so on; `cpu` for a dry run.
        steps: refinement steps of a call.
        rounds: turns of each contender.
        calls: measured calls of a turn, after one that does not count.
        endured_calls: of the fastest of ours, whose memory is watched; 0 for none.
    """

    device: str
    steps: int
    rounds: int
    calls: int
    endured_calls: int


@dataclass(kw_only=True)
class _Entry:
    """A contender while the cell is measured."""

    worker: GpuWorker
    results: Path
    row: GpuRow

    def attempt(self, work: Callable[[], GpuRow]) -> None:
        """Take the row that the work gives; if the contender fails, keep the reason and end its process."""
        try:
            self.row = work()
        except WorkerError as error:
            self.row = replace(self.row, reason=str(error))
            self.worker.close()


def measure_gpu_cell(
    files: ModelFiles,
    inputs: NDArray[np.uint8],
    contenders: Sequence[GpuContender],
    settings: GpuSettings,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[GpuRow, ...]:
    """Measure contenders on one batch; the baseline takes part in any case.

    Each lives in a process of its own. They are opened one after the other, with the others idle, so that the memory
    that the device lacks then is theirs. Every round gives each a turn of several calls; the next round starts with
    another one.

    Args:
        files: the model.
        inputs: uint8 [N, H, W, 3] of the encoder's size: the batch.
        contenders: rows of the table.
        settings: see there.
        progress: told in a few words what begins.
    Returns:
        A row per contender, in the table's order.
    """
    chosen = {BASELINE, *(contender.name for contender in contenders)}
    entries: list[_Entry] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        np.save(Path(folder) / "inputs.npy", inputs)
        for contender in GPU_CONTENDERS.values():
            if contender.name not in chosen:
                continue
            progress(f"{contender.label}: opening")
            entries.append(_start(contender, files, Path(folder), settings))
            stack.callback(entries[-1].worker.close)
        reference = _read_results(entries[0])
        for entry in entries:
            entry.row = _compared(entry, reference)
        _measure_rounds(entries, settings, progress)
        _endure(entries, settings, progress)
    return tuple(entry.row for entry in entries)


def row_without_figures(contender: GpuContender, reason: str) -> GpuRow:
    """Return the row of a contender that cannot take part."""
    return replace(_empty_row(contender), reason=reason)


def _start(contender: GpuContender, files: ModelFiles, folder: Path, settings: GpuSettings) -> _Entry:
    """Open a contender, call it until it is warm, and keep its results."""
    worker = GpuWorker(
        contender,
        files,
        folder / "inputs.npy",
        steps=settings.steps,
        device=settings.device,
        log=folder / f"{contender.name}.log",
    )
    entry = _Entry(worker=worker, results=folder / f"{contender.name}.npz", row=_empty_row(contender))

    def prepare() -> GpuRow:
        open_s = worker.open()
        times = worker.call(WARM_UP_CALLS, entry.results)
        return replace(entry.row, open_s=open_s, device_mib=times.device_mib)

    entry.attempt(prepare)
    return entry


def _compared(entry: _Entry, reference: InversionResult | None) -> GpuRow:
    """Return the row with the difference from the reference; one of NaN or infinity has no figures."""
    found = _read_results(entry)
    if found is None:
        return entry.row
    if not (np.isfinite(found.images).all() and np.isfinite(found.latents).all()):
        entry.worker.close()
        return replace(entry.row, reason="its results are not finite")
    if reference is None:
        return entry.row
    difference = difference_of(found, reference)
    if entry.row.precision == "fp32" and difference.latent_error > EXACT_ERROR:
        entry.worker.close()
        return replace(entry.row, reason=f"wrong: latents {difference.latent_error:.1e} off, not {EXACT_ERROR:.0e}")
    return replace(entry.row, difference=None if entry.row.contender == BASELINE else difference)


def _read_results(entry: _Entry) -> InversionResult | None:
    if entry.row.reason is not None:
        return None
    with np.load(entry.results) as arrays:
        return InversionResult(**arrays)


def _measure_rounds(entries: Sequence[_Entry], settings: GpuSettings, progress: Callable[[str], None]) -> None:
    for turn in range(settings.rounds):
        living = [entry for entry in entries if entry.row.reason is None]
        progress(f"round {turn + 1} of {settings.rounds}: {', '.join(entry.row.contender for entry in living)}")
        first = turn % max(1, len(living))
        for entry in living[first:] + living[:first]:
            entry.attempt(lambda entry=entry: _extended(entry.row, entry.worker.call(settings.calls)))  # type: ignore[misc]


def _extended(row: GpuRow, times: CallTimes) -> GpuRow:
    return replace(
        row, gpu_ms=row.gpu_ms + times.gpu_ms, wall_ms=row.wall_ms + times.wall_ms, host_us=row.host_us + times.host_us
    )


def _endure(entries: Sequence[_Entry], settings: GpuSettings, progress: Callable[[str], None]) -> None:
    """Let the fastest of ours, in fp16 where there is one, run many times; the others keep still."""
    ours = [entry for entry in entries if entry.row.is_ours and entry.row.reason is None]
    if not ours or not settings.endured_calls:
        return
    chosen = min(ours, key=lambda entry: (entry.row.precision != "fp16", entry.row.median_ms))
    progress(f"{settings.endured_calls} calls of {chosen.row.contender}")
    chosen.attempt(lambda: replace(chosen.row, growth=chosen.worker.endure(settings.endured_calls)))


def _empty_row(contender: GpuContender) -> GpuRow:
    return GpuRow(
        contender=contender.name, label=contender.label, precision=contender.precision, is_ours=contender.is_ours
    )
