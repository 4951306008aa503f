from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from restyle_deploy.bench.comparable import unlike_environments
from restyle_deploy.bench.compare import ComparedCell, compare_reports
from restyle_deploy.bench.compare_table import format_comparison, notes_of_pair
from restyle_deploy.bench.figures import MetricFacts, StepLatency
from restyle_deploy.bench.gpu_monitor import GpuFacts
from restyle_deploy.bench.report import ConfigurationResult, Report, Row, read_report
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
    assert all((cell.verdict == "unclear") == (cell.doubt is not None) for cell in cells)
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


def one_row(report: Report, samples_ms: tuple[float, ...], *, unstable: bool = False, against: bool = False) -> Report:
    """Return a report of one row with these times, beside a reference that takes ten times as long, or alone."""
    result = report.configurations[0]
    assert result.against is not None
    latency = replace(result.rows[0].latency, samples_ms=samples_ms, unstable=unstable)
    times_ten = replace(latency, samples_ms=tuple(10 * sample for sample in samples_ms))
    reference = replace(result.against, rows=(replace(result.against.rows[0], latency=times_ten),))
    rows = (replace(result.rows[0], latency=latency),)
    return replace(report, configurations=(replace(result, rows=rows, against=reference if against else None),))


def drifting(seed: int, factor: float = 1.0) -> tuple[float, ...]:
    """Return times that jump between two speeds, as on a shared machine: another run has other shares of them."""
    generator = np.random.default_rng(seed)
    speeds = np.repeat(generator.choice([1.0, 1.4], 4), 10)
    return tuple((factor * speeds * generator.lognormal(0, 0.01, 40)).tolist())


def test_noise_of_unstable_rows_does_not_fail(report: Report) -> None:
    pairs = [(drifting(2 * seed), drifting(2 * seed + 1)) for seed in range(20)]
    found = [
        compare_reports(one_row(report, one, unstable=True), one_row(report, other), fail_above=0.05)[0]
        for one, other in pairs
    ]
    assert {(cell.verdict, cell.failures) for cell in found} == {("unclear", ())}
    assert {cell.doubt for cell in found} == {
        "its times are unstable in the first report; measure again, or both with --against torch"
    }
    assert any(cell.latency is not None and cell.latency.low > 1.05 for cell in found)
    taken_for_stable = [
        compare_reports(one_row(report, one), one_row(report, other), fail_above=0.05)[0] for one, other in pairs
    ]
    assert any(cell.failures for cell in taken_for_stable)  # what resampling takes for a slowdown


def test_unstable_rows_are_told_by_a_reference_of_the_same_rounds(report: Report) -> None:
    first = one_row(report, drifting(0), unstable=True, against=True)
    second = one_row(report, drifting(1, factor=1.1), unstable=True, against=True)
    same = compare_reports(first, second, fail_above=0.05)[0]
    assert (same.verdict, same.relative_to, same.doubt) == ("same", "torch", None)
    result = second.configurations[0]
    slow = replace(second, configurations=(replace(result, rows=(slow_row(result.rows[0], 1.1),)),))
    cell = compare_reports(first, slow, fail_above=0.05)[0]
    assert (cell.verdict, cell.failures) == ("slower", ("10.0% slower, allowed are 5.0%",))


def slow_row(row: Row, factor: float) -> Row:
    return replace(row, latency=slower(row.latency, factor))


def test_wide_intervals_are_unclear_without_a_tolerance_too(report: Report) -> None:
    wide = tuple(np.random.default_rng(4).lognormal(0, 1.5, 20).tolist())
    cell = compare_reports(one_row(report, wide), one_row(report, wide[::-1]))[0]
    assert (cell.verdict, cell.failures) == ("unclear", ())
    assert cell.doubt == "the interval of the ratio reaches past 3.0%; more --repeats narrow it"
    narrow = tuple(np.random.default_rng(4).lognormal(0, 0.01, 40).tolist())
    assert compare_reports(one_row(report, narrow), one_row(report, narrow))[0].verdict == "same"


@pytest.mark.parametrize("change", [{"version": "2.10"}, {"threads": 1}, {"library": "other"}, {"build": "debug"}])
def test_another_reference_is_not_compared_with(report: Report, change: dict[str, object]) -> None:
    result = report.configurations[0]
    assert result.against is not None
    other = replace(result.against, reference={**result.against.reference, **change})
    second = replace(report, configurations=(replace(result, against=other), *report.configurations[1:]))
    cells = compare_reports(report, second)
    assert {cell.relative_to for cell in cells} == {None}
    notes = [note for note in notes_of_pair(report, second) if "reference" in note]
    assert len(notes) == 1
    assert notes[0].startswith(
        "ratios are of the times by themselves: the reference models differ: "
        "library torch, version 2.9, threads 2, and "
    )


def with_images(report: Report, values: dict[str, tuple[float | None, ...]]) -> Report:
    """Return a report of one row with these values of the images."""
    result = report.configurations[0]
    names = tuple(map(str, range(len(next(iter(values.values()))))))
    settings = replace(report.settings, image_names=names, image_count=len(names))
    rows = (replace(result.rows[0], per_image=values),)
    return replace(report, settings=settings, configurations=(replace(result, rows=rows, against=None),))


def test_last_bits_are_not_worse_and_few_images_tell_nothing(report: Report) -> None:
    def compared(loss: float, images: int) -> ComparedCell:
        values = [20.0 + index / 10 for index in range(images)]
        after = tuple(value - loss for value in values)
        pair = with_images(report, {"psnr_db": tuple(values)}), with_images(report, {"psnr_db": after})
        return compare_reports(*pair, fail_above=0.0)[0]

    for loss, is_worse in ((1e-9, False), (0.004, False), (0.006, True)):
        cell = compared(loss, images=12)
        assert cell.quality[0].is_worse is is_worse
        assert bool(cell.failures) is is_worse
    few = compared(5.0, images=4)
    assert (few.quality[0].low, few.quality[0].high, few.quality[0].is_worse, few.failures) == (None, None, False, ())
    assert compared(5.0, images=5).failures == ("psnr_db has gone from 20.2 to 15.2",)


def test_other_images_are_not_compared(report: Report) -> None:
    names = tuple(f"other-{name}" for name in report.settings.image_names)
    other = replace(report, settings=replace(report.settings, image_names=names))
    assert all(cell.quality == () for cell in compare_reports(report, other))


def test_other_images_of_the_same_names_are_not_compared(report: Report) -> None:
    other = replace(report, settings=replace(report.settings, images_sha256="01" * 32))
    assert all(cell.quality == () for cell in compare_reports(report, other))
    assert "quality is not compared: the images have the same names, but are others" in notes_of_pair(report, other)
    older = replace(report, settings=replace(report.settings, images_sha256=None))
    assert all(cell.quality for cell in compare_reports(report, older))
    assert (
        "not both reports record a hash of their images: they are taken to be the same by their names"
        in notes_of_pair(report, older)
    )


@pytest.mark.parametrize(
    ("first", "second", "note"),
    [
        ({"source": "reworded; SHA-256 ab"}, {"source": "model, SHA-256 ab"}, None),
        (
            {"source": "model, SHA-256 ab"},
            {"source": "model, SHA-256 cd"},
            "PSNR (dB) is not compared, it differs in its model: SHA-256 ab and SHA-256 cd",
        ),
        ({"source": "SHA-256 ab"}, {}, "PSNR (dB) is not compared, it differs in its model: SHA-256 ab and none"),
        ({"definition": "reworded.", "source": "others; NumPy"}, {}, None),
        (
            {"depends_on": {"model_sha256": "ab", "size": [112, 112]}},
            {"depends_on": {"model_sha256": "ab", "size": [64, 112]}},
            "PSNR (dB) is not compared, it differs in size 112 112 and 64 112",
        ),
        (
            {"depends_on": {"model_sha256": "ab"}},
            {"depends_on": {"model_sha256": "cd"}, "source": "renamed.onnx"},
            "PSNR (dB) is not compared, it differs in model_sha256 ab and cd",
        ),
        (
            {"depends_on": {"model_sha256": "ab"}},
            {"depends_on": {"model_sha256": "ab"}, "source": "renamed.onnx"},
            None,
        ),
        (
            {"depends_on": {"model_sha256": "ab"}},
            {},
            "PSNR (dB): the second report does not record what its model is given; both name the same model",
        ),
    ],
)
def test_metrics_of_another_model_are_not_compared(
    report: Report, first: dict[str, object], second: dict[str, object], note: str | None
) -> None:
    def changed(facts: dict[str, object]) -> Report:
        metrics = tuple(
            MetricFacts(**{**vars(metric), **facts}) if metric.name == "psnr_db" else metric
            for metric in report.metrics
        )
        return replace(report, metrics=metrics)

    pair = changed(first), changed(second)
    names = {change.metric for cell in compare_reports(*pair) for change in cell.quality}
    assert ("psnr_db" in names) is (note is None or "is not compared" not in note)
    notes = [text for text in notes_of_pair(*pair) if text.startswith("PSNR")]
    assert notes == ([] if note is None else [note])


def test_lost_metrics_fail(report: Report) -> None:
    values: dict[str, tuple[float | None, ...]] = {
        name: (0.5, 0.6, 0.7, 0.8, 0.9) for name in ("mse", "psnr_db", "ssim")
    }
    first = with_images(report, values)
    broken = tuple(
        replace(metric, missing="no file" if metric.name == "ssim" else metric.missing) for metric in report.metrics
    )
    second = replace(with_images(report, {**values, "mse": (None, *values["mse"][1:])}), metrics=broken)
    assert compare_reports(first, second)[0].failures == ()
    assert compare_reports(first, second, fail_above=0.05)[0].failures == (
        "ssim is lost: no file",
        "mse is lost: 1 of 5 images have no value any more",
    )
    unasked = replace(first, metrics=report.metrics[:2])
    assert compare_reports(first, unasked, fail_above=0.05)[0].failures == ("ssim is lost: not asked for",)
    assert compare_reports(unasked, first, fail_above=0.05)[0].failures == ()


def test_image_that_became_perfect_is_not_lost_but_all_of_them_are(report: Report) -> None:
    first = with_images(report, {"psnr_db": (20.0, 21.0)})
    perfect = with_images(report, {"psnr_db": (None, 21.0)})
    assert compare_reports(first, perfect, fail_above=0.05)[0].failures == ()
    gone = with_images(report, {"psnr_db": (None, None)})
    assert compare_reports(first, gone, fail_above=0.05)[0].failures == (
        "psnr_db is lost: 2 of 2 images have no value any more",
    )


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
    pair = replace(steady, settings=replace(steady.settings, image_count=4))
    assert notes_of_pair(pair, pair) == ["no quality is called worse: of fewer than 5 images one cannot tell"]


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


def gpu(driver: str) -> GpuFacts:
    return GpuFacts(
        name="Some GPU",
        driver=driver,
        memory_bytes=2**30,
        max_sm_mhz=1000,
        max_memory_mhz=1000,
        power_limit_w=100.0,
        persistent=True,
    )


def test_directory_of_the_bundle_may_have_another_name(report: Report) -> None:
    assert unlike_environments(report, replace(report, bundle=replace(report.bundle, name="renamed"))) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Linux-6.1.0-13-amd64-x86_64-with-glibc2.36", "Linux-6.1.0-18-amd64-x86_64-with-glibc2.36"),
        ("Linux-6.18.44-fc-v657-x86_64-with-glibc2.36", "Linux-6.18.45-fc-v660-x86_64-with-glibc2.36"),
        ("macOS-14.1-arm64-arm-64bit", "macOS-14.1.2-arm64-arm-64bit"),
    ],
)
def test_other_build_of_the_system_is_noted(report: Report, first: str, second: str) -> None:
    pair = [replace(report, environment=replace(report.environment, platform=name)) for name in (first, second)]
    assert unlike_environments(*pair) == []
    assert f"platform {first} and {second}" in notes_of_pair(pair[0], pair[1])


@pytest.mark.parametrize("other", ["Linux-6.2.0-13-x86_64", "Linux-6.1.0-aarch64", "Windows-10-10.0.19045-SP0"])
def test_other_systems_are_refused(report: Report, other: str) -> None:
    second = replace(report, environment=replace(report.environment, platform=other))
    with pytest.raises(ReportError, match="not alike: platform Linux-6.1 x86_64 and "):
        compare_reports(report, second)
    assert notes_of_pair(report, second)[0].startswith("compared all the same, though not alike: platform ")


def test_other_patch_level_of_the_driver_is_noted_and_another_branch_refused(report: Report) -> None:
    first, patched, other = (
        replace(report, environment=replace(report.environment, gpus=(gpu(driver), gpu(driver))))
        for driver in ("550.54.14", "550.90.07", "560.35.03")
    )
    assert unlike_environments(first, patched) == []
    assert notes_of_pair(first, patched).count("GPU driver 550.54.14 and 550.90.07") == 1
    assert "driver 550" in unlike_environments(first, other)[0]
    assert unlike_environments(first, report)[0].endswith(" and none")


def test_reports_that_are_stored_can_be_compared() -> None:
    for path in sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("demo-*.json")):
        stored = read_report(path)
        cells = compare_reports(stored, stored, fail_above=0.05)
        assert cells
        assert not any(cell.failures for cell in cells)


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
    assert lines[16].startswith("openvino                     1      2.13       2.30   1.080 (1.067 to 1.095) ")
    assert lines[16].endswith("slower")
    assert lines[31] == "* of the ratios to torch, measured in the same rounds of each report"
    assert lines[32] == (
        "UNCLEAR 3 rows, neither passed nor failed: its times are unstable in both reports; "
        "measure again, or both with --against torch"
    )
    assert lines[33].startswith(
        "UNCLEAR 1 row, neither passed nor failed: the interval of the ratio reaches past 5.0%;"
    )
    assert lines[34] == "FAIL openvino, 1 step: 8.0% slower, allowed are 5.0%"
    assert len(lines) == 39
