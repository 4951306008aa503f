"""The set of metrics: what runs, what is missing and why, and how it is measured."""

import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from restyle_deploy.bench.metrics import METRICS, MetricOptions, open_metrics, table
from restyle_deploy.bench.metrics.base import Gauge, Metric
from restyle_deploy.bench.metrics.dlib_descriptor import open_dlib
from restyle_deploy.bench.metrics.identity import open_identity
from restyle_deploy.bench.metrics.perceptual import open_lpips
from restyle_deploy.bench.metrics.pixels import measure_l2, measure_mse, measure_psnr
from restyle_deploy.bench.metrics.structure import measure_ms_ssim, measure_ssim
from restyle_deploy.bench.metrics.table import MAX_BATCH
from restyle_deploy.errors import MetricError

SHAPE = (16, 24)
PIXELS = MetricOptions(names=("mse", "l2", "psnr_db", "ssim"))
DOCUMENTED = (
    measure_mse,
    measure_l2,
    measure_psnr,
    measure_ssim,
    measure_ms_ssim,
    open_lpips,
    open_identity,
    open_dlib,
)


def random_images(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("index", range(len(METRICS)))
def test_each_docstring_tells_range_direction_and_source(index: int) -> None:
    metric, text = METRICS[index], DOCUMENTED[index].__doc__ or ""
    direction = "higher" if metric.higher_is_better else "lower"
    assert f"Range: {metric.lowest:.0f} " in text
    assert f"; {direction} is better." in text
    assert "Source: " in text
    assert metric.definition.endswith(".")
    assert metric.source


def test_names_and_ranges_are_sound() -> None:
    assert len({metric.name for metric in METRICS}) == len({metric.label for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.lowest is not None
        assert metric.highest is None or metric.lowest < metric.highest


def test_all_are_asked_for_and_what_cannot_run_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO), open_metrics(MetricOptions(), (64, 64)) as metrics:
        missing = metrics.missing
        assert "--lpips-backbone FILE" in missing["lpips"]
        assert "--identity-model FILE" in missing["identity"]
        assert "64x64 pixels are too small" in missing["ms_ssim"]
        assert [metric.name for metric in metrics.available][:4] == ["mse", "l2", "psnr_db", "ssim"]
        assert [fact.name for fact in metrics.facts] == [metric.name for metric in METRICS]
        assert {fact.name: fact.missing for fact in metrics.facts if fact.missing} == missing
        images = np.zeros((1, 3, 64, 64), np.float32)
        assert set(metrics.measure(images, images)) == {metric.name for metric in metrics.available}
    assert "LPIPS is not measured: no AlexNet weights" in caplog.text


def test_names_choose_and_the_order_is_the_tables() -> None:
    with open_metrics(MetricOptions(names=("ssim", "mse")), SHAPE) as metrics:
        assert [metric.name for metric in metrics.available] == ["mse", "ssim"]
        assert not metrics.missing


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no metric fid, niqe; there are mse, l2, psnr_db, ssim"):
        open_metrics(MetricOptions(names=("mse", "fid", "niqe")), SHAPE)


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("skimage", "psnr_db", "bench"), ("skimage", "ssim", "bench"), ("torchmetrics", "ms_ssim", "metrics")],
)
def test_missing_libraries_are_told_with_the_command(
    module: str, name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with open_metrics(MetricOptions(names=("mse", name)), (192, 192)) as metrics:
        assert metrics.missing == {name: f"{module} is not installed; run: pip install 'restyle-deploy[{extra}]'"}
        assert [metric.name for metric in metrics.available] == ["mse"]


def test_a_library_that_cannot_be_imported_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dlib.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "face_recognition_models.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "dlib", raising=False)
    with open_metrics(MetricOptions(names=("mse", "dlib")), SHAPE) as metrics:
        assert "importing it fails with RuntimeError: operator torchvision::nms" in metrics.missing["dlib"]
        assert "pip install 'restyle-deploy[dlib]'" in metrics.missing["dlib"]
        assert [metric.name for metric in metrics.available] == ["mse"]


def test_a_model_that_does_not_fit_is_found_at_opening(tmp_path: Path) -> None:
    from tests.bench.test_metrics_identity import write_model

    file = write_model(tmp_path / "face.onnx", keepdims=1)
    with open_metrics(MetricOptions(names=("mse", "identity"), identity_model=file), SHAPE) as metrics:
        assert "its first output is [1, 3, 1, 1]" in metrics.missing["identity"]


def test_a_model_that_takes_one_image_without_saying_so_is_found_at_opening(tmp_path: Path) -> None:
    from tests.bench.test_metrics_identity import write_model

    shape = helper.make_node("Constant", [], ["shape"], value_ints=[1, -1])
    reshape = helper.make_node("Reshape", ["embedding", "shape"], ["flat"])
    file = write_model(tmp_path / "face.onnx", extra=[shape, reshape], output="flat")
    with open_metrics(MetricOptions(names=("mse", "identity"), identity_model=file), SHAPE) as metrics:
        assert "its first output is [1, 6] for 2 images" in metrics.missing["identity"]
        assert set(metrics.measure(random_images(3), random_images(3))) == {"mse"}


class FailingGauges:
    """Stands for the table's openers; a gauge fails from a count of its calls on, or at once at its opening.

    Attributes:
        failures: by metric name: how many calls go well, and what is raised then.
        calls: of each metric.
    """

    def __init__(self) -> None:
        self.failures: dict[str, tuple[int, Exception]] = {}
        self.calls: Counter[str] = Counter()

    def opener(self, metric: Metric) -> Callable[[MetricOptions, tuple[int, int]], Gauge]:
        def measure(images: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float64]:
            self.calls[metric.name] += 1
            good, error = self.failures.get(metric.name, (self.calls[metric.name], RuntimeError()))
            if self.calls[metric.name] > good:
                raise error
            return np.zeros(len(images))

        return lambda options, shape: Gauge(metric=metric, measure=measure)


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> FailingGauges:
    """Let made-up gauges stand for all metrics."""
    fake = FailingGauges()
    monkeypatch.setattr(table, "_TABLE", tuple((metric, fake.opener(metric)) for metric in METRICS))
    return fake


PROBES = 2  # calls of each gauge at the opening
LIBRARY_ERRORS = [
    (MetricError("face.onnx: cannot run it"), "face.onnx: cannot run it"),
    (RuntimeError("CUDA error: no kernel image\nmore"), "RuntimeError: CUDA error: no kernel image"),
    (MemoryError(), "MemoryError: MemoryError"),
]


@pytest.mark.parametrize(("error", "reason"), LIBRARY_ERRORS)
def test_a_metric_that_fails_on_real_images_is_dropped_and_the_others_go_on(
    gauges: FailingGauges, caplog: pytest.LogCaptureFixture, error: Exception, reason: str
) -> None:
    gauges.failures["lpips"] = (PROBES + 1, error)  # the first batch goes well
    images = random_images(MAX_BATCH + 1)
    with open_metrics(MetricOptions(names=("mse", "lpips", "dlib")), SHAPE) as metrics:
        assert [metric.name for metric in metrics.available] == ["mse", "lpips", "dlib"]
        for _ in range(2):
            assert set(metrics.measure(images, images)) == {"mse", "dlib"}
        assert [metric.name for metric in metrics.available] == ["mse", "dlib"]
        assert metrics.missing == {"lpips": f"it failed while it measured: {reason}"}
        assert [(fact.name, fact.missing) for fact in metrics.facts] == [
            ("mse", None),
            ("lpips", metrics.missing["lpips"]),
            ("dlib", None),
        ]
    assert (gauges.calls["lpips"], gauges.calls["dlib"]) == (PROBES + 2, PROBES + 4)
    assert "LPIPS is measured no more" in caplog.text


@pytest.mark.parametrize(("error", "reason"), LIBRARY_ERRORS)
def test_a_metric_that_fails_at_opening_is_missing(gauges: FailingGauges, error: Exception, reason: str) -> None:
    gauges.failures["ssim"] = (0, error)
    with open_metrics(MetricOptions(names=("mse", "ssim")), SHAPE) as metrics:
        assert (metrics.missing, [metric.name for metric in metrics.available]) == ({"ssim": reason}, ["mse"])


@pytest.mark.parametrize("good_calls", [0, PROBES])
def test_bugs_in_a_metric_pass_through(gauges: FailingGauges, good_calls: int) -> None:
    gauges.failures["ssim"] = (good_calls, TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"), open_metrics(MetricOptions(names=("ssim",)), SHAPE) as metrics:
        metrics.measure(random_images(1), random_images(1))


def test_many_images_are_measured_as_each_one() -> None:
    images, targets = random_images(2 * MAX_BATCH + 3), random_images(2 * MAX_BATCH + 3, seed=1)
    with open_metrics(PIXELS, SHAPE) as metrics:
        together = metrics.measure(images, targets)
        for index in (0, MAX_BATCH, len(images) - 1):
            alone = metrics.measure(images[index : index + 1], targets[index : index + 1])
            assert {name: values[index] for name, values in together.items()} == pytest.approx(
                {name: values[0] for name, values in alone.items()}
            )
        assert all(values.dtype == np.float64 for values in together.values())


def test_images_that_are_not_finite_have_no_value_and_the_others_have() -> None:
    images, targets = random_images(3), random_images(3, seed=1)
    images[0, 1, 2, 3], images[2, 0] = np.nan, np.inf
    with open_metrics(PIXELS, SHAPE) as metrics:
        for values in metrics.measure(images, targets).values():
            assert np.isnan(values).tolist() == [True, False, True]


def test_images_of_one_colour_are_measured() -> None:
    grey, black = np.zeros((1, 3, *SHAPE), np.float32), np.full((1, 3, *SHAPE), -1, np.float32)
    with open_metrics(PIXELS, SHAPE) as metrics:
        values = metrics.measure(grey, black)
        assert values["mse"] == 1
        assert values["psnr_db"] == pytest.approx(10 * np.log10(4))
        assert 0 <= values["ssim"] < 0.01
        assert np.isposinf(metrics.measure(grey, grey)["psnr_db"])


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 3, 16, 24), (3, 16, 24), (0, 3, 16, 24)])
def test_other_shapes_and_no_images_are_refused(shape: tuple[int, ...]) -> None:
    with (
        open_metrics(PIXELS, SHAPE) as metrics,
        pytest.raises(ValueError, match=r"expected \['N', 3, 16, 24\] for both, N >= 1"),
    ):
        metrics.measure(np.zeros(shape, np.float32), random_images(1))


def test_closed_metrics_are_refused() -> None:
    metrics = open_metrics(PIXELS, SHAPE)
    metrics.close()
    metrics.close()
    with pytest.raises(ValueError, match="the metrics are closed"):
        metrics.measure(random_images(1), random_images(1))


def test_metrics_are_described_and_pixels_measured_without_heavy_libraries() -> None:
    program = """
import sys
blocked = ["torch", "torchmetrics", "skimage", "onnxruntime", "onnx", "dlib", "scipy", "matplotlib", "click"]
sys.modules.update(dict.fromkeys(blocked))
import numpy as np
from restyle_deploy.bench.metrics import MetricOptions, open_metrics
from restyle_deploy.bench.quality import aggregate
images = np.zeros((1, 3, 256, 256), np.float32)
with open_metrics(MetricOptions(), (256, 256)) as metrics:
    print(*metrics.measure(images, images), *metrics.missing)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["mse", "l2", "psnr_db", "ssim", "ms_ssim", "lpips", "identity", "dlib"]
