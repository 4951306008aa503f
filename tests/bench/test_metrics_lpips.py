"""LPIPS with a random backbone, against the formula of the paper in NumPy; no published backbone is needed."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from restyle_deploy.bench.metrics.base import Gauge, MetricOptions
from restyle_deploy.bench.metrics.perceptual import LEAST_SIDE, cached_backbone, open_lpips
from restyle_deploy.errors import MetricError

Array = NDArray[np.float64]
Weights = dict[str, torch.Tensor]
SHAPE = (64, 48)
# Of the file v0.1/alex.pth in the wheel of lpips 0.1.4.
LINEAR_SHA256 = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"
LINEAR_FILE = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
# torchvision's AlexNet: index, weight's shape, stride, padding, and whether a 3 x 3 max-pool of stride 2 precedes.
LAYERS = (
    (0, (64, 3, 11, 11), 4, 2, False),
    (3, (192, 64, 5, 5), 1, 2, True),
    (6, (384, 192, 3, 3), 1, 1, True),
    (8, (256, 384, 3, 3), 1, 1, False),
    (10, (256, 256, 3, 3), 1, 1, False),
)


@pytest.fixture(scope="module")
def weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index, shape, *_ in LAYERS:
        fan_in = shape[1] * shape[2] * shape[3]
        tensors[f"features.{index}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        tensors[f"features.{index}.bias"] = torch.randn(shape[:1], generator=generator) * 0.1
    return tensors


@pytest.fixture(scope="module")
def backbone(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("backbone") / "alexnet-owt-random.pth"
    torch.save({**weights, "classifier.1.bias": torch.zeros(3)}, file)
    return file


@pytest.fixture(scope="module")
def gauge(backbone: Path) -> Gauge:
    return open_lpips(MetricOptions(lpips_backbone=backbone), SHAPE)


def random_images(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, *SHAPE)).astype(np.float32)


def convolve(planes: Array, weight: Array, bias: Array, stride: int, padding: int) -> Array:
    padded = np.pad(planes, ((0, 0), (padding, padding), (padding, padding)))
    size = weight.shape[-1]
    windows = sliding_window_view(padded, (size, size), axis=(1, 2))[:, ::stride, ::stride]  # [I, h, w, k, k]
    result: Array = np.tensordot(weight, windows, axes=((1, 2, 3), (0, 3, 4))) + bias[:, None, None]
    return result


def activations_by_hand(image: NDArray[np.float32], weights: Weights) -> list[Array]:
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    current = (image.astype(np.float64) - shift[:, None, None]) / scale[:, None, None]
    kept = []
    for index, _, stride, padding, pooled in LAYERS:
        if pooled:
            current = sliding_window_view(current, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(-1, -2))
        weight, bias = (weights[f"features.{index}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        current = convolve(current, weight, bias, stride, padding).clip(0)
        kept.append(current)
    return kept


def lpips_by_hand(image: NDArray[np.float32], target: NDArray[np.float32], weights: Weights) -> float:
    linear = torch.load(LINEAR_FILE, map_location="cpu", weights_only=True)
    value = 0.0
    pairs = zip(activations_by_hand(image, weights), activations_by_hand(target, weights), strict=True)
    for index, (first, second) in enumerate(pairs):
        units = [array / (np.sqrt((array**2).sum(axis=0)) + 1e-10) for array in (first, second)]
        per_channel = linear[f"lin{index}.model.1.weight"].double().numpy().reshape(-1, 1, 1)
        value += float((per_channel * (units[0] - units[1]) ** 2).sum(axis=0).mean())
    return value


def test_linear_weights_are_those_of_the_lpips_package() -> None:
    assert hashlib.sha256(LINEAR_FILE.read_bytes()).hexdigest() == LINEAR_SHA256


def test_value_is_that_of_the_paper(gauge: Gauge, weights: Weights) -> None:
    targets = random_images(2)
    images = (targets * np.array([0.9, 0.3], np.float32).reshape(2, 1, 1, 1)).astype(np.float32)
    expected = [lpips_by_hand(image, target, weights) for image, target in zip(images, targets, strict=True)]
    assert gauge.measure(images, targets) == pytest.approx(expected, rel=1e-4)
    assert 0 < expected[0] < expected[1]


def test_equal_and_clipped_images_have_no_distance(gauge: Gauge) -> None:
    targets = np.sign(random_images(1))
    assert gauge.measure(targets * np.float32(3), targets) == 0


def test_a_black_image_is_measured(gauge: Gauge) -> None:
    black = np.full((1, 3, *SHAPE), -1, np.float32)
    assert np.isfinite(gauge.measure(black, random_images(1))).all()


def test_the_source_names_the_backbone_and_that_it_is_not_the_published_one(gauge: Gauge, backbone: Path) -> None:
    digest = hashlib.sha256(backbone.read_bytes()).hexdigest()[:16]
    assert f"not torchvision's published file: alexnet-owt-random.pth, SHA-256 {digest}" in gauge.metric.source


def test_the_backbone_in_the_hub_cache_is_taken(
    backbone: Path, gauge: Gauge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(backbone.read_bytes())
    (tmp_path / "hub" / "checkpoints" / "alexnet-owt-4df8aa71.pth").write_bytes(b"damaged, and not looked at")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = open_lpips(MetricOptions(), SHAPE)
    images, targets = random_images(1, seed=1), random_images(1)
    assert cached.measure(images, targets) == gauge.measure(images, targets)
    assert "alexnet-owt-7be5be79.pth" in cached.metric.source


@pytest.mark.parametrize("variable", ["TORCH_HOME", "XDG_CACHE_HOME", None])
def test_hub_cache_is_where_torch_has_it(variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCH_HOME": None, "XDG_CACHE_HOME": None, "HOME": tmp_path, variable: tmp_path / "x"}.items():
        if name is not None:
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, str(value))
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    assert cached_backbone() is None
    (folder / "alexnet-owt-7be5be79.pth").touch()
    assert cached_backbone() == folder / "alexnet-owt-7be5be79.pth"


def test_without_a_backbone_it_is_told_and_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MetricError, match=r"not downloaded; give .*7be5be79\.pth: --lpips-backbone FILE"):
        open_lpips(MetricOptions(), SHAPE)
    assert not list(tmp_path.iterdir())


def test_bad_backbones_are_refused(weights: Weights, tmp_path: Path) -> None:
    file = tmp_path / "backbone.pth"
    options = MetricOptions(lpips_backbone=file)
    with pytest.raises(MetricError, match="cannot be read: No such file"):
        open_lpips(options, SHAPE)
    file.write_bytes(b"no weights")
    with pytest.raises(MetricError, match="not a file of torch weights, or damaged"):
        open_lpips(options, SHAPE)
    torch.save(torch.zeros(3), file)
    with pytest.raises(MetricError, match=r"features\.0\.weight is missing, expected \[64, 3, 11, 11\]"):
        open_lpips(options, SHAPE)
    torch.save({**weights, "features.3.weight": torch.zeros(192, 64, 3, 3)}, file)
    with pytest.raises(MetricError, match=r"features\.3\.weight is \[192, 64, 3, 3\], expected \[192, 64, 5, 5\]"):
        open_lpips(options, SHAPE)


def test_the_least_side_is_measured_and_less_is_refused(backbone: Path) -> None:
    options = MetricOptions(lpips_backbone=backbone)
    images = random_images(1)[:, :, :LEAST_SIDE, :LEAST_SIDE]
    assert open_lpips(options, (LEAST_SIDE, LEAST_SIDE)).measure(images * np.float32(0.5), images) > 0
    with pytest.raises(MetricError, match="30x64 pixels are too small for AlexNet; expected at least 31"):
        open_lpips(options, (LEAST_SIDE - 1, 64))
