import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy import reference
from restyle_deploy.bench.report import read_report
from restyle_deploy.bench.run import run_bench
from restyle_deploy.bundle import Bundle
from restyle_deploy.errors import BackendUnavailableError, ReportError, VerificationError
from restyle_deploy.models.restyle import RestyleModel
from restyle_deploy.runtime.session import Session
from restyle_deploy.verify import load_expectation, save_expectation


def named_images(count: int) -> list[tuple[str, NDArray[np.uint8]]]:
    random = np.random.default_rng(0)
    return [(f"photo{index}", random.integers(0, 256, (20, 30, 3), np.uint8)) for index in range(count)]


def run_quickly(session: Any, output: Path, **changes: Any) -> Any:
    settings = {"images": named_images(3), "steps": (1, 2, 5), "warmup": 1, "repeats": 3, **changes}
    return run_bench(session, settings.pop("images"), output, **settings)


def test_everything_is_written(session: Any, tmp_path: Path) -> None:
    report = run_quickly(session, tmp_path / "new" / "out", strip_count=2)
    written = {str(path.relative_to(tmp_path / "new" / "out")) for path in (tmp_path / "new" / "out").rglob("*.*")}
    assert written == {
        "report.json",
        "quality-latency.png",
        "quality-latency.svg",
        "strips/photo0.png",
        "strips/photo1.png",
    }
    assert read_report(tmp_path / "new" / "out" / "report.json") == report


def test_report_says_what_was_done(session: Any, tmp_path: Path) -> None:
    report = run_quickly(session, tmp_path)
    assert (report.bundle.name, report.bundle.output_size, report.bundle.domain) == ("made-up", 32, "custom")
    assert report.session["backend"] == "made-up"
    assert (report.settings.batch, report.settings.image_count, report.settings.steps) == (1, 3, (1, 2, 5))
    assert report.created.endswith("+00:00")
    assert [row.steps for row in report.rows] == [1, 2, 5]
    assert {len(row.latency.samples_ms) for row in report.rows} == {3}
    assert {len(row.latency.warmup_ms) for row in report.rows} == {1}


def test_quality_is_counted_at_the_size_of_the_input(session: Any, tmp_path: Path) -> None:
    report = run_quickly(session, tmp_path)
    energy = report.rows[0].quality.mse / 0.25  # what is left after k steps of halving is 4^-k of the target's energy
    for row in report.rows:
        assert row.quality.mse == pytest.approx(energy * 4.0**-row.steps, rel=1e-4)
        assert [image.name for image in row.images] == ["photo0", "photo1", "photo2"]
        assert row.quality.mse == pytest.approx(np.mean([image.quality.mse for image in row.images]))


def test_each_image_is_inverted_once_and_timing_is_at_batch_one(session: Any, tmp_path: Path) -> None:
    run_quickly(session, tmp_path, images=named_images(11), repeats=2, steps=(5, 1))
    parity_call, *quality_calls = [call for call in session.calls if call[2]]
    timed_calls = [call for call in session.calls if not call[2]]
    assert parity_call == (2, 3, True)
    assert quality_calls == [(8, 5, True), (3, 5, True)]
    assert timed_calls == [(1, 1, False), (1, 5, False), (1, 5, False), (1, 1, False), (1, 1, False), (1, 5, False)]


def test_progress_counts_refinement_steps(session: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run_quickly(session, tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = 3 * 5 + (1 + 3) * (1 + 2 + 5)
    assert {entry[1] for entry in seen} == {total}
    assert [entry[0] for entry in seen] == sorted({entry[0] for entry in seen})
    assert seen[-1] == (total, total)


def test_a_second_run_replaces_the_first(session: Any, tmp_path: Path) -> None:
    run_quickly(session, tmp_path)
    run_quickly(session, tmp_path, steps=(1,))
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["steps"] == [1]


@pytest.mark.parametrize("steps", [(), (0, 1), (1, 1)])
def test_unusable_step_counts_are_refused(session: Any, tmp_path: Path, steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="step counts are"):
        run_quickly(session, tmp_path, steps=steps)


def test_no_images_are_refused(session: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images"):
        run_quickly(session, tmp_path, images=[])


@pytest.mark.parametrize("names", [("same", "same"), ("a/b", "c"), ("", "c")])
def test_names_that_are_no_unique_files_are_refused(session: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="not unique file names"):
        run_quickly(session, tmp_path, images=[(name, image) for name in names])


def test_folder_that_cannot_be_written_is_named_before_the_work(session: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="no folder that can be written to"):
        run_quickly(session, tmp_path / "file" / "out")
    assert session.calls == []


def test_missing_library_is_named_before_the_work(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailableError, match="matplotlib"):
        run_quickly(session, tmp_path)
    assert session.calls == []


def test_a_session_that_computes_something_else_is_not_measured(session: Any, tmp_path: Path) -> None:
    expectation = load_expectation(session.bundle.expectation)
    save_expectation(session.bundle.expectation, replace(expectation, latents=expectation.latents + 1e-3))
    with pytest.raises(VerificationError, match="made-up: differs from the reference model"):
        run_quickly(session, tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()


def test_what_a_session_is_compared_with_must_fit(session: Any, approximate: Any, tmp_path: Path) -> None:
    for measured, exact, reason in (
        (approximate, None, "pass an exact session"),
        (session, session, "compared with no other session"),
        (approximate, approximate, "passed as `exact` is approximate"),
    ):
        with pytest.raises(ValueError, match=reason):
            run_quickly(measured, tmp_path, exact=exact)
    with pytest.raises(ValueError, match="against is 'tensorflow', expected one of torch"):
        run_quickly(session, tmp_path, against="tensorflow")
    assert session.calls == approximate.calls == []


def test_approximate_session_is_measured_with_the_exact_one(session: Any, approximate: Any, tmp_path: Path) -> None:
    report = run_quickly(approximate, tmp_path, exact=session)
    assert read_report(tmp_path / "report.json") == report
    assert report.session["preview_steps"] is True
    assert report.exact.session["preview_steps"] is False
    for row, exact in zip(report.rows, report.exact.rows, strict=True):
        assert exact.difference.latent_error == pytest.approx(0.01)
        assert exact.difference.psnr_db == pytest.approx(20 * np.log10(2 / 0.01), abs=0.5)  # less where values clip
        assert exact.ratio.median == pytest.approx(
            np.median(np.divide(exact.latency.samples_ms, row.latency.samples_ms))
        )
        assert exact.quality.mse != row.quality.mse
    parity_call, *others = session.calls
    assert parity_call == (2, 3, True)  # the exact session stands for the approximate one
    assert [call for call in others if call[2]] == [(3, 5, True)]
    assert approximate.calls[:3] == [(3, 1, False), (3, 2, False), (3, 5, False)]


def test_progress_counts_both_sessions(session: Any, approximate: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run_quickly(approximate, tmp_path, exact=session, progress=lambda done, total: seen.append((done, total)))
    total = 3 * 5 + 3 * (1 + 2 + 5) + 2 * (1 + 3) * (1 + 2 + 5)
    assert seen[-1] == (total, total)


def test_reference_model_is_measured_in_the_same_rounds(toy_bundle: Path, tmp_path: Path) -> None:
    with Session.open(toy_bundle, threads=1) as session:
        report = run_quickly(session, tmp_path, against="torch", steps=(1, 2))
    assert read_report(tmp_path / "report.json") == report
    assert report.against.reference["library"] == "torch"
    assert report.against.reference["threads"] == 1
    for row, compared in zip(report.rows, report.against.rows, strict=True):
        ratios = np.divide(compared.latency.samples_ms, row.latency.samples_ms)
        assert compared.ratio.median == pytest.approx(np.median(ratios))
        assert compared.ratio.lower_quartile <= compared.ratio.median <= compared.ratio.upper_quartile


def test_reference_model_that_computes_something_else_is_not_measured(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuild = reference.model_from_bundle

    def rebuild_another(bundle: Bundle) -> RestyleModel:
        model = rebuild(bundle)
        model.latent_avg = model.latent_avg + 1e-3
        return model

    monkeypatch.setattr(reference, "model_from_bundle", rebuild_another)
    with Session.open(toy_bundle, threads=1) as session, pytest.raises(VerificationError, match="differs from"):
        run_quickly(session, tmp_path, against="torch")
    assert not (tmp_path / "report.json").exists()


def test_missing_torch_is_one_line_with_the_remedy(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailableError, match=r"needs torch, .*pip install 'restyle-deploy\[export\]'"):
        run_quickly(session, tmp_path, against="torch")
    assert session.calls == []
