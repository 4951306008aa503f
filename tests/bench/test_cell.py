"""One configuration, measured: on a session that is made up."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.bench import cell
from restyle_deploy.bench.cell import measure_configuration
from restyle_deploy.bench.figures import LoadPoint, StepLatency
from restyle_deploy.bench.job import Job, plain_metric_options
from restyle_deploy.bench.metrics import METRICS, MetricOptions, table
from restyle_deploy.bench.metrics.base import Gauge
from restyle_deploy.bench.metrics.pixels import measure_mse
from restyle_deploy.bench.report import Configuration
from restyle_deploy.bundle import Bundle
from restyle_deploy.errors import VerificationError
from restyle_deploy.verify import load_expectation, save_expectation
from tests.bench.made_up import INPUT_SIZE, FakeSession
from tests.bench.reports import made_up_latency
from tests.pictures import write_picture

STEPS = (1, 2, 5)
SESSION_ARGUMENTS = {
    "backend": "openvino",
    "device": "cpu",
    "threads": 2,
    "precision": "fp32",
    "plain": False,
    "preview_steps": False,
    "max_batch": 1,
    "timing_enabled": False,
}


class FakeOpening:
    """Stands for `Session.open`; keeps the arguments and the sessions."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.arguments: list[dict[str, Any]] = []
        self.sessions: list[FakeSession] = []

    def open(self, bundle: str, **arguments: Any) -> FakeSession:
        assert bundle == str(self.bundle.path)
        self.arguments.append(arguments)
        names = ("precision", "preview_steps", "timing_enabled")
        is_exact = arguments["precision"] == "fp32" and not arguments["preview_steps"]
        chosen = {name: arguments[name] for name in names}
        self.sessions.append(FakeSession(self.bundle, offset=0.0 if is_exact else 0.01, **chosen))
        return self.sessions[-1]


@pytest.fixture
def opening(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> FakeOpening:
    fake = FakeOpening(bundle)
    monkeypatch.setattr("restyle_deploy.runtime.session.Session.open", fake.open)
    return fake


@pytest.fixture
def job(bundle: Bundle, tmp_path: Path) -> Job:
    """Three images, three calls of each step count, no warm-up."""
    shape = (3, 3, INPUT_SIZE, INPUT_SIZE)
    np.save(tmp_path / "targets.npy", np.random.default_rng(0).uniform(-0.9, 0.9, shape).astype(np.float32))
    return Job(
        bundle=str(bundle.path),
        configuration=Configuration(backend="openvino", threads=2),
        steps=STEPS,
        warmup=1,
        repeats=3,
        targets=str(tmp_path / "targets.npy"),
        names=("a", "b", "c"),
        files=(),
        output=str(tmp_path / "out"),
        picture_count=1,
        metrics=plain_metric_options(MetricOptions(names=("mse", "psnr_db"))),
    )


def changed(job: Job, **changes: Any) -> Job:
    return replace(job, configuration=replace(job.configuration, **changes))


def test_everything_is_measured(opening: FakeOpening, job: Job) -> None:
    facts, result = measure_configuration(job)
    assert [metric.name for metric in facts] == ["mse", "psnr_db"]
    assert (result.status, result.reason) == ("ok", None)
    assert result.session is not None
    assert result.session["backend"] == "made-up"
    assert result.parity is not None
    assert result.opening_ms is not None
    assert result.opening_ms > 0
    assert result.memory is not None
    assert result.memory.peak_host_bytes > 2**20
    assert result.machine is not None
    assert (result.exact, result.against, result.load) == (None, None, ())
    assert [row.steps for row in result.rows] == list(STEPS)
    for row in result.rows:
        assert (len(row.latency.warmup_ms), len(row.latency.samples_ms)) == (1, 3)
        assert row.throughput == pytest.approx(1e3 / np.mean(row.latency.samples_ms))
        assert row.quality["mse"].mean == pytest.approx(np.mean(np.array(row.per_image["mse"], float)))
        assert row.stages == {"upload": 1, "encoder": 2 * row.steps, "generator": 3 * row.steps, "download": 4}
    assert not any(session.is_open for session in opening.sessions)


def test_gains_are_between_neighbouring_step_counts(opening: FakeOpening, job: Job) -> None:
    _, result = measure_configuration(job)
    psnr = [gain for gain in result.gains if gain.metric == "psnr_db"]
    assert [(gain.from_steps, gain.to_steps) for gain in psnr] == [(1, 2), (2, 5)]
    assert [gain.gain for gain in psnr] == pytest.approx([20 * np.log10(2), 60 * np.log10(2)], rel=1e-3)
    assert "psnr_db" not in result.settled_at_steps


def test_first_calls_are_seen_apart(opening: FakeOpening, job: Job) -> None:
    _, result = measure_configuration(job)
    timed = [call for call in opening.sessions[0].calls if not call[2]]
    assert sorted(timed[:3]) == [(1, steps, False) for steps in STEPS]
    assert len(timed) == (1 + 1 + 3) * len(STEPS)
    for row in result.rows:
        assert row.latency.first_call_ms not in (None, *row.latency.warmup_ms)


def test_session_is_opened_as_the_configuration_says(opening: FakeOpening, job: Job) -> None:
    measure_configuration(job)
    assert opening.arguments == [SESSION_ARGUMENTS, {**SESSION_ARGUMENTS, "timing_enabled": True}]
    measure_configuration(changed(job, plan="plain", batch=4, device="cpu", backend="onnxruntime"))
    assert opening.arguments[2] == {**SESSION_ARGUMENTS, "backend": "onnxruntime", "plain": True, "max_batch": 4}


def test_calls_have_the_configurations_batch_even_of_fewer_images(opening: FakeOpening, job: Job) -> None:
    _, result = measure_configuration(changed(job, batch=4))
    assert {count for count, _, every_step in opening.sessions[0].calls if not every_step} == {4}
    for row in result.rows:
        assert row.throughput == pytest.approx(4e3 / np.mean(row.latency.samples_ms))
        assert len(row.per_image["mse"]) == 3


def test_approximate_session_is_measured_beside_the_exact_one(opening: FakeOpening, job: Job) -> None:
    _, result = measure_configuration(changed(job, precision="bf16", preview_steps=True))
    approximate, exact, _ = opening.sessions
    assert opening.arguments[:2] == [
        {**SESSION_ARGUMENTS, "precision": "bf16", "preview_steps": True},
        SESSION_ARGUMENTS,
    ]
    assert result.session is not None
    assert result.session["precision"] == "bf16"
    assert result.exact is not None
    assert result.exact.session["precision"] == "fp32"
    for row, other in zip(result.rows, result.exact.rows, strict=True):
        assert other.steps == row.steps
        assert other.difference.latent_error == pytest.approx(0.01)
        ratios = np.divide(other.latency.samples_ms, row.latency.samples_ms)
        assert other.ratio.median == pytest.approx(np.median(ratios))
        assert other.quality["mse"].mean != row.quality["mse"].mean
    assert exact.calls[0] == (2, 3, True)  # the exact session stands for the approximate one
    assert (2, 3, True) not in approximate.calls


def test_job_without_metrics_has_speed_alone(opening: FakeOpening, job: Job) -> None:
    facts, result = measure_configuration(replace(changed(job, precision="bf16"), metrics=None, steps=(5,)))
    assert (facts, result.gains, result.exact) == ((), (), None)
    assert [(row.steps, row.quality, row.per_image) for row in result.rows] == [(5, {}, {})]
    assert opening.sessions[1].calls == [(2, 3, True)]  # the exact session is there for the parity alone
    assert not (Path(job.output) / "images").exists()


def test_throughput_is_what_is_kept_up_and_not_the_medians(
    opening: FakeOpening, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_latencies(runs: Any, **_: Any) -> dict[Any, StepLatency]:
        return {run: replace(made_up_latency(10.0, 0.01, seed=0), samples_ms=(*[10.0] * 9, 110.0)) for run in runs}

    monkeypatch.setattr(cell, "measure_latencies", measure_latencies)
    _, result = measure_configuration(changed(job, batch=4))
    assert [row.throughput for row in result.rows] == pytest.approx([4 * 50] * len(STEPS))


def test_metric_that_fails_on_the_images_leaves_the_rest(
    opening: FakeOpening, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets through the two calls of the opening and the first step count, and fails at the second one."""
    calls: list[int] = []

    def measure(images: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float64]:
        calls.append(len(images))
        if len(calls) > 3:
            raise RuntimeError("CUDA error: no kernel image is available")
        return np.zeros(len(images))

    openers = [(metric, partial(Gauge, metric=metric)) for metric in METRICS if metric.name in ("mse", "lpips")]
    gauges = {"mse": measure_mse, "lpips": measure}
    rows = [(metric, lambda *_, make=make, name=metric.name: make(measure=gauges[name])) for metric, make in openers]
    monkeypatch.setattr(table, "_TABLE", tuple(rows))
    facts, result = measure_configuration(
        replace(changed(job, precision="bf16"), metrics=plain_metric_options(MetricOptions()))
    )
    assert [metric.missing for metric in facts if metric.name == "mse"] == [None]
    (missing,) = [metric.missing for metric in facts if metric.name == "lpips"]
    assert missing == "it failed while it measured: RuntimeError: CUDA error: no kernel image is available"
    assert (result.status, result.reason) == ("ok", f"LPIPS: {missing}")
    assert {gain.metric for gain in result.gains} == {"mse"}
    assert result.exact is not None
    for row, exact in zip(result.rows, result.exact.rows, strict=True):
        assert (set(row.quality), set(row.per_image), set(exact.quality)) == ({"mse"},) * 3
        assert len(row.latency.samples_ms) == 3


def test_session_that_computes_something_else_is_not_measured(opening: FakeOpening, bundle: Bundle, job: Job) -> None:
    expectation = load_expectation(bundle.expectation)
    save_expectation(bundle.expectation, replace(expectation, latents=expectation.latents + 1e-3))
    with pytest.raises(VerificationError, match="made-up: differs from the reference model"):
        measure_configuration(job)
    assert not Path(job.output).exists()
    assert not opening.sessions[0].is_open


def test_pictures_are_written(opening: FakeOpening, job: Job) -> None:
    measure_configuration(job)
    place = Path(job.output) / "images" / "openvino-cpu-fp32-engine-b1-t2"
    assert {path.relative_to(place).as_posix() for path in place.rglob("*.png")} == {
        "a/target.png",
        *(f"a/step-{steps}.png" for steps in STEPS),
    }


def test_stages_around_the_session_are_those_of_the_files(opening: FakeOpening, job: Job, tmp_path: Path) -> None:
    _, result = measure_configuration(replace(job, files=(str(write_picture(tmp_path / "a.png")),)))
    assert list(result.rows[0].stages) == [
        "decode",
        "preprocess",
        "upload",
        "encoder",
        "generator",
        "download",
        "encode",
    ]


def test_load_is_of_the_largest_step_count(opening: FakeOpening, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float]] = []

    def measure_load(call: Any, *, rate_per_s: float, seconds: float) -> LoadPoint:
        asked.append((rate_per_s, seconds))
        call()
        times = dict.fromkeys(("p50_ms", "p90_ms", "p95_ms", "p99_ms"), 1.0)
        return LoadPoint(rate_per_s=rate_per_s, achieved_per_s=1.0, samples_ms=(1.0,), dropped=0, **times)

    monkeypatch.setattr(cell, "measure_load", measure_load)
    _, result = measure_configuration(replace(job, load_shares=(0.5, 0.9), load_rates=(12.0,), load_seconds=7))
    calls_per_s = 1e3 / float(np.mean(result.rows[-1].latency.samples_ms))
    rates, seconds = zip(*asked, strict=True)
    assert rates == pytest.approx((0.5 * calls_per_s, 0.9 * calls_per_s, 12))
    assert seconds == (7, 7, 7)
    assert tuple(point.rate_per_s for point in result.load) == rates
    assert opening.sessions[0].calls[-3:] == [(1, 5, False)] * 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_progress_ends_at_its_total(opening: FakeOpening, job: Job, precision: str) -> None:
    seen: list[tuple[int, int]] = []
    job = replace(changed(job, precision=precision), warmup=2)
    measure_configuration(job, progress=lambda done, total: seen.append((done, total)))
    sessions = 1 if precision == "fp32" else 2
    total = sessions * (3 * 5 + (2 + 3) * (1 + 2 + 5))
    assert {entry[1] for entry in seen} == {total}
    assert [entry[0] for entry in seen] == sorted({entry[0] for entry in seen})
    assert seen[-1] == (total, total)


def test_reference_model_is_measured_in_the_same_rounds(
    opening: FakeOpening, bundle: Bundle, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = FakeSession(bundle)

    @contextmanager
    def open_reference(_: Bundle, *, threads: int | None) -> Iterator[FakeSession]:
        assert threads == 2
        yield reference

    monkeypatch.setattr(cell, "open_torch_reference", open_reference)
    _, result = measure_configuration(replace(job, against="torch"))
    assert result.against is not None
    for row, compared in zip(result.rows, result.against.rows, strict=True):
        ratios = np.divide(compared.latency.samples_ms, row.latency.samples_ms)
        assert compared.ratio.median == pytest.approx(np.median(ratios))
        assert compared.ratio.lower_quartile <= compared.ratio.median <= compared.ratio.upper_quartile
    assert len([call for call in reference.calls if not call[2]]) == (1 + 3) * len(STEPS)
