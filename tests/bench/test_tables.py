from dataclasses import replace
from typing import Any

import pytest

from restyle_deploy.bench.figures import Gain
from restyle_deploy.bench.report import ConfigurationResult, Report
from restyle_deploy.bench.tables import format_table, is_memory_short, notes_of, table_of
from restyle_deploy.runtime.device import REMEDY


def test_a_line_per_configuration_and_step_count(report: Report) -> None:
    table = table_of(report)
    assert table.headers[:8] == (
        "configuration",
        "steps",
        "median ms",
        "p95 ms",
        "images/s",
        "MSE",
        "PSNR (dB)",
        "SSIM",
    )
    assert len(table.rows) == 30
    assert table.keys[2] == ("onnxruntime-cpu-fp32-engine-b1", 3)
    row = report.configurations[0].rows[2]
    assert [cell.order for cell in table.rows[2][1:5]] == [
        3,
        row.latency.median_ms,
        row.latency.p95_ms,
        row.throughput,
    ]
    assert table.rows[2][7].text == f"{row.quality['ssim'].mean:.3f}"


def test_compared_columns_are_filled_where_something_was_compared(report: Report) -> None:
    table = table_of(report)
    assert table.headers[8:-1] == ("exact/this", "PSNR to exact (dB)", "latent error", "reference/this")
    texts = [[cell.text for cell in row[8:-1]] for row in table.rows]
    assert texts[0][:3] == ["-", "-", "-"]
    assert texts[0][3].startswith("8.0")
    assert texts[20][1:] == ["40.8", "1.0e-02", "-"]


def test_front_is_the_decisions(report: Report) -> None:
    assert report.decision is not None
    table = table_of(report)
    assert table.headers[-1] == "front"
    marked = {key for key, row in zip(table.keys, table.rows, strict=True) if row[-1].text == "yes"}
    assert marked == set(report.decision.pareto)
    lines = format_table(report).splitlines()
    assert sum(line.endswith("  yes") for line in lines) == len(marked)
    assert "front: beaten by no row in latency, images per second and quality together" in lines
    assert table_of(replace(report, decision=None)).headers[-1] == "reference/this"


def swept(first: ConfigurationResult, *outcomes: float | str, **changes: Any) -> tuple[ConfigurationResult, ...]:
    """Return a sweep's results: images per second of batch 1, 2 and so on, or why a batch failed."""
    results = []
    for index, outcome in enumerate(outcomes):
        configuration = replace(first.configuration, batch=2**index, **changes)
        if isinstance(outcome, str):
            results.append(ConfigurationResult(configuration=configuration, status="failed", reason=outcome))
            continue
        quality = first.rows[-1].quality if index == 0 else {}
        row = replace(first.rows[-1], throughput=outcome, quality=quality)
        rest: dict[str, Any] = {"gains": (), "against": None, "settled_at_steps": {}}
        results.append(replace(first, configuration=configuration, rows=(row,), **rest))
    return tuple(results)


@pytest.mark.parametrize(
    "reason",
    [
        "it needed more memory than there is",
        "the process was killed; most likely it needed more memory than there is",
        "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes",
        "the process died (exit status 1): std::bad_alloc",
        "cuda:0: 70.00 GiB asked for, 3.20 of 79.10 GiB are free (cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY); "
        "a smaller max_batch needs less",
        f"cuda:0: PyTorch 2.9 cannot run the graph: CUDNN_STATUS_ALLOC_FAILED; {REMEDY}",
        "TensorRT 10.9: Requested amount of GPU memory (34359738368 bytes) could not be allocated",
    ],
)
@pytest.mark.parametrize(("device", "place"), [("cpu", "host"), ("cuda:0", "device")])
def test_batch_that_does_not_fit_is_noted(report: Report, reason: str, device: str, place: str) -> None:
    results = swept(report.configurations[0], 100.0, 190.0, reason, device=device)
    assert [is_memory_short(result) for result in results] == [False, False, True]
    notes = notes_of(replace(report, configurations=results))
    where = "onnxruntime, batch 2"
    assert f"{where}: fills the {place}: batch 4 needs more memory than there is" in notes
    assert f"onnxruntime, batch 4: failed: {reason}" in notes


@pytest.mark.parametrize(
    "reason",
    [
        "BuildError: the profile ends at 2",
        f"cuda:0: PyTorch 2.9 cannot run the graph: CUDA error: unspecified launch failure; {REMEDY}",
        "cuda:0: 1.00 GiB asked for, 3.20 of 79.10 GiB are free (cuMemAlloc: CUDA_ERROR_ILLEGAL_ADDRESS); "
        "a smaller max_batch needs less",
    ],
)
def test_batch_that_failed_for_another_reason_fills_nothing(report: Report, reason: str) -> None:
    results = swept(report.configurations[0], 100.0, 190.0, reason)
    assert not is_memory_short(results[-1])
    assert not [note for note in notes_of(replace(report, configurations=results)) if "fills" in note]


def test_sweep_that_ended_at_its_largest_batch_is_noted(report: Report) -> None:
    results = swept(report.configurations[0], 100.0, 190.0, 360.0)
    (note,) = [note for note in notes_of(replace(report, configurations=results)) if "sweep" in note]
    assert note == (
        "onnxruntime, batch 4: the sweep ended here, at its largest batch, before images/s ceased to grow; "
        "go on with --max-batch 8"
    )
    # Batches that were asked for are no sweep, and one that the time budget ended has a row that says so.
    asked = [replace(result, rows=report.configurations[0].rows[-1:]) for result in results]
    late = replace(results[-1].configuration, batch=8)
    spent = (*results, ConfigurationResult(configuration=late, status="skipped", reason="the time budget was spent"))
    for others in (tuple(asked), spent):
        assert not [note for note in notes_of(replace(report, configurations=others)) if "sweep" in note]


def test_metric_that_failed_in_one_configuration_is_noted(report: Report) -> None:
    failed = replace(report.configurations[0], reason="LPIPS: it failed while it measured: RuntimeError: no kernel")
    notes = notes_of(replace(report, configurations=(failed, *report.configurations[1:])))
    assert "onnxruntime: LPIPS: it failed while it measured: RuntimeError: no kernel" in notes


def test_batch_that_fills_the_device_is_noted(report: Report) -> None:
    def fills(*speeds: float) -> list[str]:
        results = swept(report.configurations[0], *speeds)
        return [note for note in notes_of(replace(report, configurations=results)) if "fills the device" in note]

    assert fills(100.0, 180.0, 181.0, 182.0) == [
        "onnxruntime, batch 2: fills the device; larger batches bring less than 5% more images/s"
    ]
    assert fills(100.0, 180.0, 250.0, 300.0) == []


def test_columns_of_nothing_are_left_out(report: Report) -> None:
    alone = replace(report, configurations=report.configurations[1:2])
    assert len(table_of(alone).headers) == 8


def test_equal_images_come_last_when_sorted_by_psnr(report: Report) -> None:
    result = report.configurations[4]
    assert result.exact is not None
    rows = tuple(replace(row, difference=replace(row.difference, psnr_db=None)) for row in result.exact.rows)
    equal = replace(report, configurations=(replace(result, exact=replace(result.exact, rows=rows)),))
    cell = table_of(equal).rows[0][9]
    assert (cell.text, cell.order) == ("equal", float("inf"))


def test_text_names_what_is_unstable_failed_skipped_or_missing(report: Report) -> None:
    text = format_table(report)
    assert "! openvino, bf16, 2 steps: unstable: the interquartile range is above 10% of the median" in text
    assert "onnxruntime, cuda:0: failed: the process was killed by signal 9" in text
    assert "openvino, batch 16: skipped: the time budget of 600 s was used up" in text
    assert text.endswith("Not shown: LPIPS (no weights of the backbone: give --lpips-backbone FILE).")


def test_text_of_a_stable_report_is_the_table_alone(report: Report) -> None:
    first = replace(report.configurations[0], settled_at_steps={})
    calm = replace(report, configurations=(first,), metrics=report.metrics[:1], decision=None)
    lines = format_table(calm).splitlines()
    assert len(lines) == 6
    assert lines[1].split()[:3] == ["onnxruntime", "1", "2.52"]


def test_from_which_step_on_it_gets_worse(report: Report) -> None:
    first = report.configurations[0]
    signs = {"mse": (1, 1, 1, 1), "psnr_db": (1, 1, -1, -1), "ssim": (1, 1, -1, -1)}
    gains = tuple(
        Gain(metric=name, from_steps=from_steps, to_steps=to_steps, gain=sign * 0.5, low=sign * 0.5, high=sign * 0.5)
        for name, row in signs.items()
        for (from_steps, to_steps), sign in zip([(1, 2), (2, 3), (3, 5), (5, 10)], row, strict=True)
    )
    results = (replace(first, gains=gains, settled_at_steps={"psnr_db": 2, "ssim": 3}),)
    notes = notes_of(replace(report, configurations=results))
    assert "onnxruntime: more steps gain less than these images tell from 2 steps (PSNR (dB)) on" in notes
    assert "onnxruntime: more steps make it worse from 3 steps (PSNR (dB)), 3 steps (SSIM) on" in notes


def test_from_which_step_on_a_gain_cannot_be_told(report: Report) -> None:
    names = [metric.name for metric in report.metrics[:2]]
    settled = dict(zip(names, (3, 1), strict=True))
    results = tuple(replace(result, settled_at_steps=settled) for result in report.configurations[:2])
    (note,) = [line for line in notes_of(replace(report, configurations=results)) if "more steps" in line]
    labels = [metric.label for metric in report.metrics[:2]]
    assert note.endswith(
        f": more steps gain less than these images tell from 3 steps ({labels[0]}), 1 step ({labels[1]}) on"
    )
