"""Made-up reports: the figures have the course that real ones have, but nothing was measured."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.comparison import Against, ComparedRow, Difference, Exact, ExactRow, ratio_from_samples
from restyle_deploy.bench.environment import Environment
from restyle_deploy.bench.figures import Aggregate, Gain, LoadPoint, Memory, MetricFacts, StepLatency
from restyle_deploy.bench.report import (
    BundleFacts,
    Configuration,
    ConfigurationResult,
    Decision,
    Report,
    Row,
    Settings,
)
from restyle_deploy.bench.strips import write_step_images

STEPS = (1, 2, 3, 5, 10)
IMAGE_NAMES = tuple(f"portrait-{index:02}" for index in range(12))
REPEATS = 20

METRICS = (
    MetricFacts(
        name="mse",
        label="MSE",
        unit="",
        decimals=4,
        higher_is_better=False,
        lowest=0.0,
        highest=None,
        definition="Mean squared error on [-1, 1].",
        source="made up",
    ),
    MetricFacts(
        name="psnr_db",
        label="PSNR (dB)",
        unit="dB",
        decimals=2,
        higher_is_better=True,
        lowest=None,
        highest=None,
        definition="Peak signal-to-noise ratio, peak to peak 2.",
        source="made up",
    ),
    MetricFacts(
        name="ssim",
        label="SSIM",
        unit="",
        decimals=3,
        higher_is_better=True,
        lowest=-1.0,
        highest=1.0,
        definition="Structural similarity.",
        source="Wang et al. 2004, doi:10.1109/TIP.2003.819861",
    ),
    MetricFacts(
        name="lpips",
        label="LPIPS",
        unit="",
        decimals=3,
        higher_is_better=False,
        lowest=0.0,
        highest=None,
        definition="Learned perceptual distance, AlexNet v0.1.",
        source="Zhang et al. 2018, arXiv:1801.03924",
        missing="no weights of the backbone: give --lpips-backbone FILE",
    ),
)

# Milliseconds of one step at batch 1, spread of the samples, and what the images lose, as a share of their error.
CONFIGURATIONS: tuple[tuple[Configuration, float, float, float], ...] = (
    (Configuration(backend="onnxruntime"), 2.1, 0.01, 0.0),
    (Configuration(backend="onnxruntime", plan="plain"), 3.4, 0.01, 0.0),
    (Configuration(backend="onnxruntime", batch=4), 7.3, 0.01, 0.0),
    (Configuration(backend="openvino"), 1.7, 0.02, 0.0),
    (Configuration(backend="openvino", precision="bf16"), 0.9, 0.15, 0.06),
    (Configuration(backend="openvino", preview_steps=True), 1.2, 0.02, 0.02),
)


def made_up_report() -> Report:
    """Six configurations that ran, one that failed and one that was skipped; LPIPS could not run."""
    results = [_result(*row) for row in CONFIGURATIONS]
    results[0] = _with_reference(results[0])
    results[4] = _with_exact(results[4])
    failed = Configuration(backend="onnxruntime", device="cuda:0")
    skipped = Configuration(backend="openvino", batch=16)
    results += [
        ConfigurationResult(configuration=failed, status="failed", reason="the process was killed by signal 9"),
        ConfigurationResult(configuration=skipped, status="skipped", reason="the time budget of 600 s was used up"),
    ]
    return Report(
        created="2026-01-02T03:04:05+00:00",
        environment=made_up_environment(),
        bundle=BundleFacts(name="demo-faces", domain="custom", output_size=64, checkpoint_sha256="ab" * 32),
        settings=Settings(
            steps=STEPS,
            warmup=3,
            repeats=REPEATS,
            image_count=len(IMAGE_NAMES),
            image_names=IMAGE_NAMES,
            images_sha256="ef" * 32,
        ),
        metrics=METRICS,
        configurations=tuple(results),
        decision=Decision(
            configuration="openvino-cpu-fp32-engine-b1",
            steps=5,
            budget_ms=20.0,
            minimums={"ssim": 0.8},
            reason="the best SSIM of those that take at most 20 ms and have SSIM of at least 0.8",
            pareto=(
                ("openvino-cpu-bf16-engine-b1", 1),
                ("openvino-cpu-fp32-engine-b1", 3),
                ("openvino-cpu-fp32-engine-b1", 5),
                ("openvino-cpu-fp32-engine-b1", 10),
            ),
        ),
    )


def made_up_environment() -> Environment:
    """Return a machine that there is not."""
    return Environment(
        python="3.12.1",
        platform="Linux-6.1-x86_64",
        cpu="Some CPU",
        logical_cores=4,
        usable_cores=2,
        load_average=(0.5, 0.25, 0.125),
        packages={"numpy": "2.0.0", "onnxruntime": "1.23.0"},
        commit=None,
    )


def made_up_latency(median_ms: float, spread: float, seed: int) -> StepLatency:
    """Return samples about a median, with a tail; unstable above a spread of a tenth."""
    samples = median_ms * np.exp(np.abs(np.random.default_rng(seed).normal(0, spread, REPEATS)))
    quartiles = np.percentile(samples, (25, 75))
    unstable = bool(quartiles[1] - quartiles[0] > 0.1 * np.median(samples))
    return StepLatency(
        median_ms=float(np.median(samples)),
        p90_ms=float(np.percentile(samples, 90)),
        p95_ms=float(np.percentile(samples, 95)),
        p99_ms=float(np.percentile(samples, 99)),
        iqr_ms=float(quartiles[1] - quartiles[0]),
        unstable=unstable,
        reason="the interquartile range is above 10% of the median" if unstable else None,
        first_call_ms=2.5 * median_ms,
        samples_ms=tuple(samples.tolist()),
        warmup_ms=(2.5 * median_ms, median_ms, median_ms),
    )


def write_made_up_images(folder: Path, report: Report, count: int = 2, pixels: int = 64) -> None:
    """Write images beside the report, for its configurations that ran: round faces that get sharper step by step."""
    for result in report.configurations:
        for index, name in enumerate(IMAGE_NAMES[:count] if result.rows else ()):
            target = _face(pixels, index, blur=0.0)
            steps = {row.steps: _face(pixels, index, blur=1.2 / row.steps) for row in result.rows}
            write_step_images(folder, result.configuration.name, name, target, steps)


def _face(pixels: int, index: int, *, blur: float) -> NDArray[np.uint8]:
    y, x = np.mgrid[-1 : 1 : pixels * 1j, -1 : 1 : pixels * 1j]
    colour = np.array([(220, 170, 130), (150, 100, 70)][index % 2])
    edge = 0.02 + 0.3 * blur
    face = 1 / (1 + np.exp((np.hypot(x, 0.8 * y) - 0.7) / edge))
    eyes = sum(np.exp(-(((x - side) ** 2 + (y + 0.2) ** 2) / (0.01 + 0.1 * blur))) for side in (-0.3, 0.3))
    image = face[..., None] * colour * (1 - 0.8 * np.clip(eyes, 0, 1))[..., None] + (1 - face[..., None]) * 60
    rounded: NDArray[np.uint8] = np.rint(image).clip(0, 255).astype(np.uint8)
    return rounded


def _result(item: Configuration, step_ms: float, spread: float, loss: float) -> ConfigurationResult:
    rows = tuple(_row(item, steps, step_ms, spread, loss) for steps in STEPS)
    gains = tuple(
        Gain(
            metric=metric,
            from_steps=first.steps,
            to_steps=second.steps,
            gain=(gain := sign * (second.quality[metric].mean or 0) - sign * (first.quality[metric].mean or 0)),
            low=gain - 0.01 * scale,
            high=gain + 0.01 * scale,
        )
        for metric, sign, scale in (("mse", -1, 0.1), ("psnr_db", 1, 10), ("ssim", 1, 1))
        for first, second in zip(rows[:-1], rows[1:], strict=True)
    )
    load = tuple(
        LoadPoint(
            rate_per_s=rate,
            achieved_per_s=min(rate, 95.0),
            p50_ms=(wait := step_ms * 5 / max(0.05, 1 - rate / 100)),
            p90_ms=1.8 * wait,
            p95_ms=2.2 * wait,
            p99_ms=3 * wait,
            samples_ms=(wait, 1.8 * wait, 3 * wait),
            dropped=0,
        )
        for rate in (10.0, 30.0, 60.0, 80.0, 95.0)
    )
    return ConfigurationResult(
        configuration=item,
        status="ok",
        session={"backend": item.backend, "device": item.device, "threads": 2, "precision": item.precision},
        parity={"latent_errors": [1e-6], "image_errors": [1e-5]},
        rows=rows,
        gains=gains,
        settled_at_steps={"psnr_db": 5, "ssim": 5},
        opening_ms=120.0,
        memory=Memory(peak_host_bytes=412 * 2**20),
        load=load if item.batch == 1 and item.plan == "engine" else (),
        machine={"governor": "performance", "other_processes_share": 0.02},
    )


def _row(item: Configuration, steps: int, step_ms: float, spread: float, loss: float) -> Row:
    latency = made_up_latency(0.4 + step_ms * steps, spread, seed=zlib.crc32(f"{item.name} {steps}".encode()))
    error = np.array(list(_errors(steps, loss)))
    values = {"mse": error, "psnr_db": 10 * np.log10(4 / error), "ssim": 1 - 2.2 * error}
    return Row(
        steps=steps,
        latency=latency,
        throughput=1e3 * item.batch / latency.median_ms,
        stages={
            "decode": 1.1,
            "preprocess": 0.3,
            "upload": 0.0,
            "encoder": 0.6 * steps * step_ms,
            "generator": 0.4 * steps * step_ms,
            "download": 0.1,
            "encode": 1.4,
        },
        quality={name: made_up_aggregate(value) for name, value in values.items()},
        per_image={name: tuple(value.tolist()) for name, value in values.items()},
    )


def _errors(steps: int, loss: float) -> Iterator[float]:
    """Yield the mean squared error of each image."""
    for index in range(len(IMAGE_NAMES)):
        yield (0.045 + 0.13 * np.exp(-steps / 1.8)) * (1 + loss) * (0.8 + 0.4 * index / len(IMAGE_NAMES))


def made_up_aggregate(values: NDArray[np.float64]) -> Aggregate:
    """Return the aggregate of finite values, with the interval of a normal mean."""
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    mean = float(values.mean())
    return Aggregate(
        mean=mean,
        median=float(np.median(values)),
        p5=float(np.percentile(values, 5)),
        p95=float(np.percentile(values, 95)),
        low=mean - half,
        high=mean + half,
        count=len(values),
    )


def _with_reference(result: ConfigurationResult) -> ConfigurationResult:
    """Add torch, which takes eight times as long."""
    rows = []
    for row in result.rows:
        latency = made_up_latency(8 * row.latency.median_ms, 0.01, seed=row.steps)
        ratio = ratio_from_samples(latency.samples_ms, row.latency.samples_ms)
        rows.append(ComparedRow(steps=row.steps, latency=latency, ratio=ratio))
    against = Against(reference={"library": "torch", "version": "2.9", "threads": 2}, rows=tuple(rows))
    return ConfigurationResult(**{**vars(result), "against": against})


def _with_exact(result: ConfigurationResult) -> ConfigurationResult:
    """Add the exact session, which takes twice as long."""
    rows = []
    for row in result.rows:
        latency = made_up_latency(2 * row.latency.median_ms, 0.01, seed=row.steps)
        rows.append(
            ExactRow(
                steps=row.steps,
                latency=latency,
                ratio=ratio_from_samples(latency.samples_ms, row.latency.samples_ms),
                quality=row.quality,
                difference=Difference(psnr_db=41.0 - row.steps / 5, latent_error=0.01 * row.steps),
            )
        )
    return ConfigurationResult(**{**vars(result), "exact": Exact(session={"precision": "fp32"}, rows=tuple(rows))})
