from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from restyle_deploy.bench.compare import ComparedCell, compare_reports, unlike_environments
from restyle_deploy.bench.compare_table import format_comparison, notes_of_pair
from restyle_deploy.bench.figures import StepLatency
from restyle_deploy.bench.report import ConfigurationResult, Report, Row
from restyle_deploy.errors import ReportError


def slower(latency: StepLatency, factor: float) -> StepLatency:
    samples = tuple(factor * sample for sample in latency.samples_ms)
    return replace(latency, samples_ms=samples, median_ms=float(np.median(samples)))


def change(report: Report, index: int, of_row: Callable[[Row], Row]) -> Report:
    """Return the report with the rows of one configuration changed."""
    results = list(report.configurations)
    results[index] = replace(results[index], rows=tuple(map(of_row, results[index].rows)))
    return replace(report, configurations=tuple(results))


def slow_down(report: Report, index: int, factor: float) -> Report:
    return change(report, index, lambda row: replace(row, latency=slower(row.latency, factor)))


def cells_of(cells: list[ComparedCell], name: str) -> list[ComparedCell]:
    return [cell for cell in cells if cell.configuration == name]


def with_reference_slower(result: ConfigurationResult, factor: float) -> ConfigurationResult:
    assert result.against is not None
    rows = tuple(replace(row, latency=slower(row.latency, factor)) for row in result.against.rows)
    return replace(result, against=replace(result.against, rows=rows))


def test_a_report_is_as_fast_and_good_as_itself(report: Report) -> None:
    cells = compare_reports(report, report, fail_above=0.05)
    assert len(cells) == 30
    assert all(cell.latency is not None and cell.latency.low <= 1 <= cell.latency.high for cell in cells)
    assert all(cell.latency is not None and cell.latency.ratio == 1 for cell in cells)
    assert {cell.verdict for cell in cells} == {"same", "unclear"}
    assert not any(cell.failures for cell in cells)
    assert not any(quality.is_worse for cell in cells for quality in cell.quality)


def test_slower_configuration_fails_past_the_tolerance(report: Report) -> None:
    name = report.configurations[3].configuration.name
    cells = cells_of(compare_reports(report, slow_down(report, 3, 1.08), fail_above=0.05), name)
    assert {cell.verdict for cell in cells} == {"slower"}
    assert cells[0].latency is not None
    assert cells[0].latency.ratio == pytest.approx(1.08)
    assert cells[0].latency.low > 1.05
    assert cells[0].failures == ("8.0% slower, allowed are 5.0%",)


@pytest.mark.parametrize(("factor", "verdict"), [(1.03, "slower"), (0.9, "faster")])
def test_within_the_tolerance_nothing_fails(report: Report, factor: float, verdict: str) -> None:
    name = report.configurations[1].configuration.name
    cells = cells_of(compare_reports(report, slow_down(report, 1, factor), fail_above=0.05), name)
    assert {cell.verdict for cell in cells} == {verdict}
    assert not any(cell.failures for cell in cells)


def test_slowdown_within_the_noise_does_not_fail(report: Report) -> None:
    name = report.configurations[4].configuration.name
    noisy = cells_of(compare_reports(report, slow_down(report, 4, 1.055), fail_above=0.05), name)
    unclear = [cell for cell in noisy if cell.verdict == "unclear"]
    assert unclear
    assert not any(cell.failures for cell in unclear)


def test_slow_day_of_the_machine_is_told_by_the_reference_model(report: Report) -> None:
    slow_day = slow_down(report, 0, 1.3)
    results = (with_reference_slower(slow_day.configurations[0], 1.3), *slow_day.configurations[1:])
    cells = compare_reports(report, replace(slow_day, configurations=results), fail_above=0.05)
    first = cells_of(cells, report.configurations[0].configuration.name)
    assert {(cell.verdict, cell.relative_to, cell.failures) for cell in first} == {("same", "torch", ())}
    assert first[0].latency is not None
    assert first[0].latency.ratio == pytest.approx(1)
    assert {cell.relative_to for cell in cells if cell not in first} == {None}


def test_without_as_many_rounds_of_the_reference_times_are_compared_alone(report: Report) -> None:
    result = report.configurations[0]
    assert result.against is not None
    short = replace(result.against.rows[0].latency, samples_ms=result.against.rows[0].latency.samples_ms[:3])
    rows = (replace(result.against.rows[0], latency=short), *result.against.rows[1:])
    results = (replace(result, against=replace(result.against, rows=rows)), *report.configurations[1:])
    cells = compare_reports(report, replace(report, configurations=results))
    assert [cell.relative_to for cell in cells[:5]] == [None, "torch", "torch", "torch", "torch"]


def test_worse_images_fail(report: Report) -> None:
    def worsen(row: Row) -> Row:
        psnr_db = tuple(value - 1.5 if value is not None else None for value in row.per_image["psnr_db"])
        return replace(row, per_image={**row.per_image, "psnr_db": psnr_db})

    cells = compare_reports(report, change(report, 1, worsen), fail_above=0.05)
    cell = cells_of(cells, report.configurations[1].configuration.name)[0]
    assert [item.metric for item in cell.quality if item.is_worse] == ["psnr_db"]
    assert cell.verdict == "same"
    assert cell.failures == ("psnr_db has gone from 15.35 to 13.85",)


def test_other_images_are_not_compared(report: Report) -> None:
    names = tuple(f"other-{name}" for name in report.settings.image_names)
    other = replace(report, settings=replace(report.settings, image_names=names))
    assert all(cell.quality == () for cell in compare_reports(report, other))


def test_few_calls_tell_nothing(report: Report) -> None:
    def shorten(row: Row) -> Row:
        return replace(row, latency=replace(row.latency, samples_ms=row.latency.samples_ms[:1]))

    slow = change(slow_down(report, 1, 1.5), 1, shorten)
    cells = cells_of(compare_reports(report, slow, fail_above=0.05), report.configurations[1].configuration.name)
    assert {(cell.verdict, cell.failures) for cell in cells} == {("unclear", ())}
    assert "rows of fewer than 5 calls are unclear; bench --repeats 20 tells more" in notes_of_pair(report, slow)


def test_notes_tell_what_is_unstable_or_not_compared(report: Report) -> None:
    steady = replace(report, configurations=report.configurations[:1])
    steady = change(steady, 0, lambda row: replace(row, latency=replace(row.latency, unstable=False)))
    assert notes_of_pair(steady, steady) == []
    shaky = change(steady, 0, lambda row: replace(row, latency=replace(row.latency, unstable=row.steps == 1)))
    metrics = (replace(report.metrics[0], missing="broken"), *report.metrics[2:])
    assert notes_of_pair(steady, replace(shaky, metrics=metrics)) == [
        "unstable times: 0 rows of the first report, 1 of the second",
        "MSE is not compared: the second report lacks it (broken)",
        "PSNR (dB) is not compared: the second report lacks it (not asked for)",
    ]
    others = replace(steady, settings=replace(steady.settings, image_names=("other",)))
    assert notes_of_pair(steady, others) == ["quality is not compared: the reports are of different images"]


def test_missing_rows_fail_and_new_ones_do_not(report: Report) -> None:
    results = list(report.configurations)
    crashed = ConfigurationResult(configuration=results[5].configuration, status="failed", reason="out of memory")
    other = replace(report, configurations=(*results[:5], crashed))
    missing = [cell for cell in compare_reports(report, other, fail_above=0.05) if cell.verdict == "missing"]
    assert len(missing) == 5
    assert missing[0].failures == ("missing in the second report (failed: out of memory)",)
    new = [cell for cell in compare_reports(other, report, fail_above=0.05) if cell.verdict == "new"]
    assert len(new) == 5
    assert new[0].failures == ()
    assert (new[0].first_ms, new[0].second_ms) == (None, results[5].rows[0].latency.median_ms)


def test_unlike_reports_are_refused_unless_allowed(report: Report) -> None:
    other = replace(
        report,
        environment=replace(report.environment, cpu="Another CPU", packages={"numpy": "3.0"}),
        bundle=replace(report.bundle, checkpoint_sha256="cd" * 32),
    )
    assert unlike_environments(report, other) == [
        "cpu Some CPU and Another CPU",
        f"bundle checkpoint_sha256 {'ab' * 32} and {'cd' * 32}",
    ]
    with pytest.raises(ReportError, match=r"not alike: cpu Some CPU and Another CPU; .*--allow-different-environments"):
        compare_reports(report, other)
    assert len(compare_reports(report, other, different_allowed=True)) == 30


def test_reports_of_other_configurations_are_refused(report: Report) -> None:
    first = replace(report, configurations=report.configurations[:1])
    second = replace(report, configurations=report.configurations[1:2])
    with pytest.raises(ReportError, match="no configuration and step count in common"):
        compare_reports(first, second)


def test_intervals_hold_the_true_ratio_about_as_often_as_they_say(report: Report) -> None:
    result = report.configurations[1]
    base = replace(report, configurations=(replace(result, rows=result.rows[:1]),))
    latency = base.configurations[0].rows[0].latency
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(60):

        def draw(row: Row, factor: float = 1.0) -> Row:
            samples = tuple((factor * generator.lognormal(1.0, 0.05, 40)).tolist())
            return replace(row, latency=replace(latency, samples_ms=samples))

        one = change(replace(base, settings=replace(base.settings, image_names=())), 0, draw)
        other = change(base, 0, lambda row: draw(row, 1.1))
        found = compare_reports(one, other)[0].latency
        assert found is not None
        held += found.low <= 1.1 <= found.high
    assert 52 <= held <= 60


def test_text_has_a_line_per_cell_and_says_what_failed(report: Report) -> None:
    cells = compare_reports(report, slow_down(report, 3, 1.08), fail_above=0.05)
    lines = format_comparison(cells, report.metrics).splitlines()
    assert lines[0].split("  ")[0] == "configuration"
    assert lines[16].startswith("openvino                     1      2.13       2.30   1.080 (1.066 to 1.096) ")
    assert lines[16].endswith("slower")
    assert lines[31] == "* of the ratios to torch, measured in the same rounds of each report"
    assert lines[32] == "FAIL openvino, 1 step: 8.0% slower, allowed are 5.0%"
    assert len(lines) == 37
