"""The whole bench, with processes that are made up: what is written, chosen and refused."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.bench.metrics import MetricOptions
from restyle_deploy.bench.report import Configuration, Report, read_report
from restyle_deploy.bench.run import BenchInterruptedError, draw_report, run_bench
from restyle_deploy.bench.schedule import BenchOptions
from restyle_deploy.bundle import Bundle
from restyle_deploy.errors import BackendUnavailableError, ReportError
from restyle_deploy.runtime.deployment import read_deployment
from tests.bench.made_up import FakeProcesses, failed_part, refuse_files_in
from tests.bench.reports import METRICS

ONE, TWO = (Configuration(backend=name, plan="plain") for name in ("onnxruntime", "openvino"))

Bench = Callable[..., Report]


def named_images(count: int) -> list[tuple[str, NDArray[np.uint8]]]:
    random = np.random.default_rng(0)
    return [(f"photo{index}", random.integers(0, 256, (20, 30, 3), np.uint8)) for index in range(count)]


@pytest.fixture
def bench(bundle: Bundle, processes: FakeProcesses, tmp_path: Path) -> Bench:
    """Run the bench on three images, one and two steps, into `out`."""

    def bench(
        *configurations: Configuration,
        images: Any = None,
        output: Path = tmp_path / "out",
        progress: Any = lambda name, done, total: None,
        **changes: Any,
    ) -> Report:
        options = BenchOptions(**{"steps": (1, 2), "picture_count": 2, **changes})
        images = named_images(3) if images is None else images
        return run_bench(bundle, images, output, configurations or (ONE,), options, progress=progress)

    return bench


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_everything_is_written(bench: Bench, tmp_path: Path) -> None:
    report = bench(output=tmp_path / "new" / "out")
    images = {
        f"images/{ONE.name}/{photo}/{name}.png"
        for photo in ("photo0", "photo1")
        for name in ("target", "step-1", "step-2")
    }
    assert files_in(tmp_path / "new" / "out") == images | {
        "report.json",
        "report.html",
        "report.md",
        "deploy.toml",
        "quality-latency.png",
        "quality-latency.svg",
        "strips/photo0.png",
        "strips/photo1.png",
        f"cells/{ONE.name}.json",
    }
    assert read_report(tmp_path / "new" / "out" / "report.json") == report


def test_report_says_what_was_done(bench: Bench) -> None:
    report = bench(ONE, TWO, time_budget_s=900.0)
    assert (report.bundle.name, report.bundle.output_size, report.bundle.domain) == ("made-up", 32, "custom")
    assert (report.settings.steps, report.settings.repeats, report.settings.warmup) == ((1, 2), 20, 3)
    assert (report.settings.image_count, report.settings.image_names) == (3, ("photo0", "photo1", "photo2"))
    assert report.settings.time_budget_s == 900
    assert report.settings.images_sha256 is not None
    other = bench(ONE, images=[(name, image // 2) for name, image in named_images(3)])
    assert other.settings.images_sha256 != report.settings.images_sha256 == bench(TWO).settings.images_sha256
    assert report.created.endswith("+00:00")
    assert [result.configuration for result in report.configurations] == [ONE, TWO]
    assert report.metrics == METRICS


def test_choice_is_written_for_sessions(bench: Bench, bundle: Bundle, tmp_path: Path) -> None:
    report = bench(budget_ms=15.0, minimums={"ssim": 0.1})
    assert report.decision is not None
    assert (report.decision.configuration, report.decision.steps) == (ONE.name, 1)
    deployment = read_deployment(tmp_path / "out" / "deploy.toml")
    assert deployment.bundle.resolve() == bundle.path.resolve()
    assert (deployment.backend, deployment.plain, deployment.max_batch, deployment.steps) == ("onnxruntime", True, 1, 1)


def test_former_choice_and_strips_do_not_stay(bench: Bench, tmp_path: Path) -> None:
    bench(images=[("former", named_images(1)[0][1])])
    (tmp_path / "out" / "load.png").write_bytes(b"former")
    report = bench(budget_ms=1.0)
    assert report.decision is not None
    assert report.decision.reason.startswith("nothing meets 1 ms")
    assert {path.name for path in (tmp_path / "out" / "strips").iterdir()} == {"photo0.png", "photo1.png"}
    assert not {"deploy.toml", "load.png"} & files_in(tmp_path / "out")


def test_failed_and_skipped_configurations_have_rows(bench: Bench, processes: FakeProcesses, tmp_path: Path) -> None:
    processes.outcomes[TWO.name] = failed_part
    report = bench(ONE, TWO, replace(ONE, plan="engine"))
    assert [result.status for result in report.configurations] == ["ok", "failed", "skipped"]
    assert "more memory than there is" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_nothing_measured_is_one_line_with_the_reasons(bench: Bench, processes: FakeProcesses, tmp_path: Path) -> None:
    processes.outcomes = {ONE.name: failed_part, TWO.name: failed_part}
    with pytest.raises(ReportError, match=f"nothing could be measured: {ONE.name}: it needed more memory.*{TWO.name}"):
        bench(ONE, TWO)
    assert not (tmp_path / "out" / "report.json").exists()


def test_interrupted_bench_reports_what_is_finished(bench: Bench, processes: FakeProcesses, tmp_path: Path) -> None:
    processes.outcomes[TWO.name] = KeyboardInterrupt()
    with pytest.raises(BenchInterruptedError, match=r"1 of 2 configurations are measured and kept in .*--resume"):
        bench(ONE, TWO)
    report = read_report(tmp_path / "out" / "report.json")
    assert [result.status for result in report.configurations] == ["ok", "skipped"]
    assert "report.html" in files_in(tmp_path / "out")
    processes.outcomes.clear()
    assert [result.status for result in bench(ONE, TWO, resume=True).configurations] == ["ok", "ok"]
    assert processes.names == [ONE.name, TWO.name, TWO.name]


def test_bench_interrupted_at_once_leaves_the_former_report(
    bench: Bench, processes: FakeProcesses, tmp_path: Path
) -> None:
    former = bench()
    processes.outcomes[ONE.name] = KeyboardInterrupt()
    with pytest.raises(BenchInterruptedError, match="0 of 1"):
        bench()
    assert read_report(tmp_path / "out" / "report.json") == former


def test_second_run_replaces_the_first(bench: Bench, tmp_path: Path) -> None:
    bench()
    bench(steps=(1,))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["steps"] == [1]


def test_progress_names_the_configuration(bench: Bench) -> None:
    seen: list[tuple[str, int, int]] = []
    bench(ONE, TWO, progress=lambda *step: seen.append(step))
    assert seen == [(ONE.name, 1, 1), (TWO.name, 1, 1)]


@pytest.mark.parametrize("count", [1, 2])
def test_few_images_are_enough(bench: Bench, count: int) -> None:
    report = bench(images=named_images(count), budget_ms=1000.0)
    assert report.settings.image_count == count
    assert report.decision is not None
    assert report.decision.steps == 2


def test_minimum_of_a_missing_metric_is_told_after_all_is_written(bench: Bench, tmp_path: Path) -> None:
    report = bench(minimums={"lpips": 0.3})
    assert report.decision is not None
    assert report.decision.configuration is None
    assert report.decision.reason.startswith("nothing was chosen: metric lpips was not measured: no weights")
    assert "report.html" in files_in(tmp_path / "out")
    assert "deploy.toml" not in files_in(tmp_path / "out")


def test_without_quality_nothing_is_chosen(bench: Bench, processes: FakeProcesses) -> None:
    processes.metrics = tuple(metric for metric in METRICS if metric.missing is not None)
    assert bench().decision is None
    decision = bench(budget_ms=5.0).decision
    assert decision is not None
    assert decision.reason == "nothing was chosen: no metric was measured: there is no quality to decide by"


def test_metric_that_any_configuration_measured_is_not_missing(bench: Bench, processes: FakeProcesses) -> None:
    bench(ONE)
    processes.metrics = tuple(replace(metric, missing=None) for metric in METRICS)
    report = bench(ONE, TWO, resume=True)
    assert {metric.name: metric.missing for metric in report.metrics}["lpips"] is None


@pytest.mark.parametrize("steps", [(), (0, 1), (1, 1)])
def test_unusable_step_counts_are_refused(bench: Bench, steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="step counts are"):
        bench(steps=steps)


def test_no_images_are_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="no images"):
        bench(images=[])


def test_no_configurations_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no configurations"):
        run_bench(bundle, named_images(1), tmp_path / "out", (), BenchOptions(steps=(1,)))


@pytest.mark.parametrize("names", [("same", "same"), ("a/b", "c"), ("", "c"), ("..", "c")])
def test_names_that_are_no_unique_files_are_refused(bench: Bench, names: tuple[str, ...]) -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="not unique file names"):
        bench(images=[(name, image) for name in names])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"metrics": MetricOptions(names=("mse", "fid"))}, "no metric fid; there are mse"),
        ({"minimums": {"fid": 1.0}}, "no metric fid; there are mse"),
        (
            {"metrics": MetricOptions(names=("mse",)), "minimums": {"ssim": 1.0}},
            "a minimum of ssim, which is not among",
        ),
        ({"minimums": {"ssim": math.nan}}, "a limit is no finite number"),
        ({"budget_ms": math.inf}, "a limit is no finite number"),
        ({"load_shares": (0.5, 0.0)}, "each must be above 0"),
        ({"load_rates": (math.inf,)}, "each must be above 0"),
        ({"against": "tensorflow"}, "against is 'tensorflow', expected one of torch"),
    ],
)
def test_impossible_wishes_are_refused_before_the_work(
    bench: Bench, processes: FakeProcesses, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        bench(**options)
    assert processes.jobs == []


def test_folder_that_cannot_be_written_is_named_before_the_work(
    bench: Bench, processes: FakeProcesses, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="no folder that can be written to"):
        bench(output=tmp_path / "file" / "out")
    assert processes.jobs == []


@pytest.mark.parametrize("place", [".", "cells"])
def test_each_folder_is_written_to_before_the_work(
    bench: Bench, processes: FakeProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """As the root user may write where the mode forbids it, the refusal is made up."""
    refused = (tmp_path / "out" / place).resolve()
    refuse_files_in(refused, monkeypatch)
    with pytest.raises(ReportError, match=rf"{refused}: no folder that can be written to: Read-only file system"):
        bench()
    assert processes.jobs == []


def test_report_is_drawn_anew_from_its_file_alone(bench: Bench, tmp_path: Path) -> None:
    bench(ONE, TWO, budget_ms=1000.0)
    drawn = {"report.html", "report.md", "quality-latency.png", "quality-latency.svg"}
    path, output = tmp_path / "alone" / "report.json", tmp_path / "drawn"
    path.parent.mkdir()
    path.write_bytes((tmp_path / "out" / "report.json").read_bytes())
    output.mkdir()
    (output / "load.png").write_bytes(b"of a former report")
    assert {file.name for file in draw_report(path, output)} == files_in(output) == drawn
    assert (output / "report.md").read_text() == (tmp_path / "out" / "report.md").read_text()
    assert "data:image/jpeg" not in (output / "report.html").read_text()
    assert 'id="images"' not in (output / "report.html").read_text()
    assert files_in(path.parent) == {"report.json"}
    beside = draw_report(tmp_path / "out" / "report.json", output)
    assert 'id="images"' in next(file for file in beside if file.name == "report.html").read_text()


@pytest.mark.parametrize(("library", "options"), [("matplotlib", {}), ("torch", {"against": "torch"})])
def test_missing_library_is_named_before_the_work(
    bench: Bench, processes: FakeProcesses, monkeypatch: pytest.MonkeyPatch, library: str, options: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BackendUnavailableError, match=f"{library}.*pip install"):
        bench(**options)
    assert processes.jobs == []
