from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.bench.report import Configuration, Report
from restyle_deploy.bench.series import (
    COLOURS,
    REFERENCE_COLOUR,
    labels_of,
    measured_metrics,
    missing_note,
    series_of,
    style_of,
    unsaid_words,
)

# How linear RGB looks to those who lack a kind of cone: Machado et al. 2009, doi:10.1109/TVCG.2009.113, severity 1.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> NDArray[np.float64]:
    srgb = np.array([int(colour[first : first + 2], 16) for first in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def cielab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio = XYZ @ rgb.clip(0, 1) / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_are_told_apart(blindness: str) -> None:
    seen = [cielab(BLINDNESS[blindness] @ linear(colour)) for colour in COLOURS]
    assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) > 18


@pytest.mark.parametrize("colour", [*COLOURS, REFERENCE_COLOUR])
def test_colours_stand_out_from_paper(colour: str) -> None:
    assert 1.05 / (XYZ[1] @ linear(colour) + 0.05) >= 3


def test_twenty_lines_differ_without_colour() -> None:
    assert len({(style_of(index).shape, style_of(index).dash) for index in range(20)}) == 20


def test_everything_measured_has_a_line_of_its_own(report: Report) -> None:
    lines = series_of(report)
    assert [line.label for line in lines] == [
        "onnxruntime",
        "torch (reference)",
        "onnxruntime, plain",
        "onnxruntime, batch 4",
        "openvino",
        "openvino, bf16",
        "openvino, preview steps",
    ]
    assert len({line.name for line in lines}) == len(lines)
    assert lines[1].points[0].latency.median_ms > 7 * lines[0].points[0].latency.median_ms
    assert lines[1].points[0].quality == lines[0].points[0].quality


def test_exact_session_has_a_line_unless_it_is_a_configuration(report: Report) -> None:
    alone = replace(report, configurations=report.configurations[4:5])
    assert [(line.label, line.kind) for line in series_of(alone)] == [
        ("openvino", "configuration"),
        ("openvino: exact session", "exact"),
    ]


def test_labels_leave_out_defaults_and_what_all_share() -> None:
    shared = [Configuration(backend="tensorrt", device="cuda:0", precision=name) for name in ("fp32", "fp16")]
    assert list(labels_of(shared).values()) == ["tensorrt", "tensorrt, fp16"]
    assert unsaid_words(shared) == "cuda:0, fp32, batch 1, where not said otherwise"
    assert unsaid_words(shared[:1]) == "cuda:0, fp32, batch 1"
    threads = [Configuration(backend="openvino", threads=count) for count in (1, 2)]
    assert list(labels_of(threads).values()) == ["openvino, 1 thread", "openvino, 2 threads"]


def test_metric_without_figures_is_named(report: Report) -> None:
    assert [metric.name for metric in measured_metrics(report)] == ["mse", "psnr_db", "ssim"]
    assert missing_note(report) == "Not shown: LPIPS (no weights of the backbone: give --lpips-backbone FILE)."
    assert missing_note(replace(report, metrics=report.metrics[:3])) is None
