from dataclasses import replace

from restyle_deploy.bench.report import Report
from restyle_deploy.bench.tables import format_table, notes_of, table_of


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
    assert table.headers[8:] == ("exact/this", "PSNR to exact (dB)", "latent error", "reference/this")
    texts = [[cell.text for cell in row[8:]] for row in table.rows]
    assert texts[0][:3] == ["-", "-", "-"]
    assert texts[0][3].startswith("8.0")
    assert texts[20][1:] == ["40.8", "1.0e-02", "-"]


def test_batch_that_fills_the_device_is_noted(report: Report) -> None:
    first = report.configurations[0]

    def swept(speeds: tuple[float, ...]) -> list[str]:
        results = tuple(
            replace(
                first,
                configuration=replace(first.configuration, batch=2**index),
                rows=(replace(first.rows[-1], throughput=speed),),
                gains=(),
                against=None,
                settled_at_steps={},
            )
            for index, speed in enumerate(speeds)
        )
        return [note for note in notes_of(replace(report, configurations=results)) if "fills the device" in note]

    assert swept((100.0, 180.0, 181.0, 182.0)) == [
        "onnxruntime, batch 2: fills the device; larger batches bring less than 5% more images/s"
    ]
    assert swept((100.0, 180.0, 250.0, 300.0)) == []


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
    calm = replace(report, configurations=(first,), metrics=report.metrics[:1])
    lines = format_table(calm).splitlines()
    assert len(lines) == 6
    assert lines[1].split()[:3] == ["onnxruntime", "1", "2.52"]


def test_from_which_step_on_a_gain_cannot_be_told(report: Report) -> None:
    names = [metric.name for metric in report.metrics[:2]]
    settled = dict(zip(names, (3, 1), strict=True))
    results = tuple(replace(result, settled_at_steps=settled) for result in report.configurations[:2])
    (note,) = [line for line in notes_of(replace(report, configurations=results)) if "more steps" in line]
    labels = [metric.label for metric in report.metrics[:2]]
    assert note.endswith(
        f": more steps gain less than these images tell from 3 steps ({labels[0]}), 1 step ({labels[1]}) on"
    )
