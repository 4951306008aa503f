"""The kernels' table without a GPU: its bytes, figures, goals and files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.kernel_table import (
    COMPILED,
    COMPILED_GOAL,
    COPY_GOAL,
    EAGER,
    FLOOR_GOAL,
    OURS,
    SHIFTED,
    Copies,
    KernelRow,
    KernelTable,
    Problem,
    copies_from,
    describe,
    device_folder,
    format_markdown,
    verdicts_of,
    write_table,
)
from benchmarks.verdicts import format_verdict
from restyle_deploy.bench.environment import describe_environment
from restyle_deploy.bench.measure import StepLatency, step_latency_from
from restyle_deploy.latency import Latency

UP_LAYER = Problem(case="up-layer", size=1024, batch=2, dtype="float16", channels_last=False)


@pytest.fixture
def row() -> KernelRow:
    return KernelRow(
        problem=UP_LAYER,
        bytes_moved=UP_LAYER.bytes_moved,
        equal_copy=_copies(UP_LAYER.bytes_moved, memcpy=0.11, kernel=0.095),
        large_copy=_copies(UP_LAYER.bytes_moved * 10, memcpy=0.7, kernel=0.8),  # so that the floor is 0.07 ms
        latencies={OURS: _latency(0.1), EAGER: _latency(0.9), COMPILED: _latency(0.25)},
        errors={OURS: 1e-4},
        reasons={SHIFTED: "it has | failed"},
    )


def _copies(bytes_moved: int, **ms: float) -> Copies:
    return copies_from(bytes_moved, {way: _latency(times) for way, times in ms.items()})


def _latency(ms: float, *more: float) -> StepLatency:
    return step_latency_from(Latency(warmup_ms=(), samples_ms=(ms, *(more or [ms] * 4))))


def test_bytes_of_the_up_layer() -> None:
    assert UP_LAYER.shape == (2, 32, 1025, 1025)
    x, y, noise = 2 * 32 * 1025 * 1025 * 2, 2 * 32 * 1024 * 1024 * 2, 1024 * 1024 * 2
    demod, next_scale, bias, taps = 2 * 32 * 4, 2 * 32 * 4, 32 * 4, 16 * 4
    assert UP_LAYER.bytes_moved == x + y + noise + demod + next_scale + bias + taps


def test_bytes_of_other_cases() -> None:
    one = replace(UP_LAYER, batch=1, dtype="float32")
    assert replace(one, case="skip").bytes_moved == 3 * (512**2 + 1024**2) * 4 + 64
    assert replace(one, case="blur").bytes_moved == 32 * (1025**2 + 1024**2) * 4 + 64
    assert replace(one, case="bias-act", size=256).bytes_moved == 2 * 128 * 256**2 * 4 + 128 * 4
    assert replace(one, case="epilogue", size=32).shape == (1, 512, 32, 32)


def test_the_faster_copy_is_the_reference() -> None:
    copies = _copies(10**6, memcpy=0.5, kernel=0.25)
    assert (copies.fastest, copies.median_ms, copies.bandwidth) == ("kernel", 0.25, 4e9)
    assert _copies(10**6, memcpy=0.125, kernel=0.25).fastest == "memcpy"


def test_figures_of_a_row(row: KernelRow) -> None:
    assert row.floor_ms == pytest.approx(0.07)
    assert row.share_of_floor == pytest.approx(0.7)
    assert row.share_of_copy == pytest.approx(0.95)
    assert row.ratio(COMPILED) == pytest.approx(2.5)
    assert row.ratio(SHIFTED) is None
    unmeasured = replace(row, latencies={})
    assert (unmeasured.share_of_floor, unmeasured.share_of_copy, unmeasured.ratio(COMPILED)) == (None, None, None)


def test_goals_by_both_copies_and_by_torch_compile(row: KernelRow) -> None:
    verdicts = verdicts_of([row])
    name = "blur and whole epilogue (up-layer), 1024 px, batch 2, float16, NCHW"
    assert {goal: [format_verdict(verdict) for verdict in found] for goal, found in verdicts.items()} == {
        COPY_GOAL: [f"pass: {name}: share of a copy of as many bytes: 0.95, goal at least 0.8"],
        FLOOR_GOAL: [f"FAIL: {name}: share of the memory floor: 0.7, goal at least 0.8"],
        COMPILED_GOAL: [f"pass: {name}: times torch.compile: 2.5, goal at least 2"],
    }


@pytest.mark.parametrize(
    ("ours_ms", "compiled_ms", "reached"),
    [
        (0.0874, 0.1748, [True, True, True]),
        (0.0876, 0.3, [True, False, True]),
        (0.11875, 0.3, [True, False, True]),
        (0.1188, 0.3, [False, False, True]),
        (0.08, 0.1599, [True, True, False]),
    ],
)
def test_goals_have_an_edge(row: KernelRow, ours_ms: float, compiled_ms: float, reached: list[bool]) -> None:
    found = verdicts_of([replace(row, latencies={OURS: _latency(ours_ms), COMPILED: _latency(compiled_ms)})])
    assert [verdict.is_reached for verdicts in found.values() for verdict in verdicts] == reached


@pytest.mark.parametrize(
    ("compiled_ms", "shifted_ms", "words"),
    [
        (0.25, 0.15, "FAIL: {}: times torch.compile, shifts: 1.5, goal at least 2"),
        (0.15, 0.25, "FAIL: {}: times torch.compile: 1.5, goal at least 2"),
        (None, 0.25, "pass: {}: times torch.compile, shifts: 2.5, goal at least 2"),
        (None, None, "FAIL: {}: times torch.compile: not measured, goal at least 2"),
    ],
)
def test_the_faster_compiled_form_counts(
    row: KernelRow, compiled_ms: float | None, shifted_ms: float | None, words: str
) -> None:
    times = {COMPILED: compiled_ms, SHIFTED: shifted_ms, OURS: 0.1}
    row = replace(row, latencies={name: _latency(ms) for name, ms in times.items() if ms is not None})
    (verdict,) = verdicts_of([row])[COMPILED_GOAL]
    assert format_verdict(verdict) == words.format(describe(row.problem))


def test_what_was_not_measured_is_not_reached(row: KernelRow) -> None:
    verdicts = verdicts_of([replace(row, latencies={})])
    assert [verdict.is_reached for found in verdicts.values() for verdict in found] == [False] * 3
    assert "not measured, goal at least 0.8" in format_verdict(verdicts[COPY_GOAL][0])


def test_goals_are_for_float16(row: KernelRow) -> None:
    assert not any(verdicts_of([replace(row, problem=replace(row.problem, dtype="float32"))]).values())
    counts = [len(found) for found in verdicts_of([replace(row, problem=replace(row.problem, case="blur"))]).values()]
    assert counts == [1, 1, 0]


@pytest.fixture
def table(row: KernelRow) -> KernelTable:
    unstable = replace(
        row, latencies={name: _latency(ms, ms, 2 * ms, 2 * ms) for name, ms in {OURS: 0.1, EAGER: 0.6}.items()}
    )
    shaken = copies_from(UP_LAYER.bytes_moved, {"kernel": _latency(0.1, 0.1, 0.2, 0.2)})
    refused = replace(row, equal_copy=shaken, latencies={}, reasons={OURS: "wrong: a | b"})
    return KernelTable(
        created="2026-01-02T03:04:05+00:00",
        environment=describe_environment(),
        device={"GPU": "NVIDIA H999 (SXM)", "driver": "1.2"},
        rows=(row, unstable, refused),
    )


def test_the_table(table: KernelTable) -> None:
    text = format_markdown(table)
    assert "GPU NVIDIA H999 (SXM), driver 1.2; 2026-01-02." in text
    assert "The goal of 80% is judged by the copy of as many bytes: starting" in text
    name = describe(UP_LAYER)
    assert f"| {name} | 0.0700 (memcpy) | 0.0950 (kernel) | 0.1000 | 70% | 95% | 9.00 | 2.50 | – |" in text
    assert f"| {name} | 0.0700 (memcpy) | 0.0950 (kernel) | 0.1500 ± | 47% | 63% | 6.00 ± | – | – |" in text
    assert f"| {name} | 0.0700 (memcpy) | 0.1500 ± (kernel) | wrong: a / b | – | – | – | – | – |" in text


def test_the_table_says_which_goals_are_reached(table: KernelTable) -> None:
    lines = format_markdown(table).splitlines()
    name = describe(UP_LAYER)
    begin = lines.index(f"- {COPY_GOAL}: reached by 1 of 3")
    assert lines[begin + 1] == f"  - pass: {name}: share of a copy of as many bytes: 0.95, goal at least 0.8"
    assert lines[begin + 4] == f"- {FLOOR_GOAL}: reached by 0 of 3"
    assert lines[begin + 5] == f"  - FAIL: {name}: share of the memory floor: 0.7, goal at least 0.8"
    assert lines[begin + 8] == f"- {COMPILED_GOAL}: reached by 1 of 3"


def test_files_are_named_after_the_device(table: KernelTable, tmp_path: Path) -> None:
    files = write_table(table, tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "nvidia-h999-sxm/kernels.json",
        "nvidia-h999-sxm/kernels.md",
    ]
    content = json.loads(files[0].read_text(encoding="utf-8"))
    assert content["format_version"] == 2
    assert content["rows"][0]["equal_copy"]["fastest"] == "kernel"
    assert content["rows"][0]["large_copy"]["fastest"] == "memcpy"
    assert content["rows"][0]["large_copy"]["latencies"]["kernel"]["samples_ms"] == [0.8] * 5
    assert content["rows"][0]["latencies"][OURS]["samples_ms"] == [0.1] * 5
    assert content["rows"][0]["problem"]["case"] == "up-layer"
    assert files[1].read_text(encoding="utf-8") == format_markdown(table)
    assert device_folder("NVIDIA H200") == "nvidia-h200"
