"""LPIPS with AlexNet, version 0.1: the published linear weights over a backbone that the user has."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.metrics.base import Gauge, Metric, MetricOptions, import_library, require_installed, shown
from restyle_deploy.errors import MetricError

LEAST_SIDE = 31  # that leaves a pixel after the second pooling
PUBLISHED_BACKBONE = "7be5be79"  # torchvision's AlexNet: how the SHA-256 of its file begins, as its name says
_LINEAR_WEIGHTS = ("functional", "image", "lpips_models", "alex.pth")
# Means and standard deviations of ImageNet, for values in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10

LPIPS = Metric(
    name="lpips",
    label="LPIPS",
    unit="",
    decimals=3,
    higher_is_better=False,
    lowest=0.0,
    highest=None,
    definition="Learned perceptual distance, AlexNet, version 0.1, at the encoder's size; of clipped values.",
    source="Zhang et al. 2018, arXiv:1801.03924; linear weights of the lpips package",
)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A convolution of AlexNet: its index among torchvision's `features`, its weight's shape, and what precedes it."""

    index: int
    weight: tuple[int, int, int, int]  # [O, I, k, k]
    stride: int
    padding: int
    pooled: bool


# Krizhevsky 2014, arXiv:1404.5997, as torchvision numbers its layers.
_LAYERS = (
    _Layer(index=0, weight=(64, 3, 11, 11), stride=4, padding=2, pooled=False),
    _Layer(index=3, weight=(192, 64, 5, 5), stride=1, padding=2, pooled=True),
    _Layer(index=6, weight=(384, 192, 3, 3), stride=1, padding=1, pooled=True),
    _Layer(index=8, weight=(256, 384, 3, 3), stride=1, padding=1, pooled=False),
    _Layer(index=10, weight=(256, 256, 3, 3), stride=1, padding=1, pooled=False),
)


def open_lpips(options: MetricOptions, shape: tuple[int, int]) -> Gauge:
    """Open LPIPS with the backbone of the options, or else with the one in torch's hub cache; nothing is downloaded.

    The value of two images is the sum over AlexNet's five activations of the mean over pixels of
    sum_c w_c (a_c - b_c)^2, where a and b are the activations, divided at each pixel by their length over channels, and
    w >= 0 are the learned weights. Values are clipped to [-1, 1], as in the pictures that are saved.

    The `lpips` package itself is not needed (it imports torchvision): its file of linear weights, v0.1/alex.pth, comes
    with torchmetrics, byte for byte. The network is computed here as the package does; torchmetrics' own LPIPS differs
    in how it keeps from dividing by zero.

    Range: 0 (equal images) to about 1 (the weights bound it, not the definition); lower is better.
    Source: Zhang et al. 2018, arXiv:1801.03924; upstream's scripts/calc_losses_on_images.py, mode "lpips".

    Raises:
        MetricError: torch, torchmetrics or the backbone's file is missing, a file does not hold the weights, or the
            images are too small.
    """
    if min(shape) < LEAST_SIDE:
        raise MetricError(
            f"images of {shape[0]}x{shape[1]} pixels are too small for AlexNet; "
            f"expected at least {LEAST_SIDE} on both sides"
        )
    import_library("torch", command="pip install 'restyle-deploy[metrics]'")
    # Only a file of it is read: importing it fails beside a torchvision of another PyTorch.
    require_installed("torchmetrics", command="pip install 'restyle-deploy[metrics]'")
    backbone = options.lpips_backbone or _require_cached_backbone()
    network = _read_network(backbone)
    digest = hashlib.sha256(backbone.read_bytes()).hexdigest()
    return Gauge(
        metric=replace(
            LPIPS,
            source=f"{LPIPS.source}; {_describe_backbone(backbone, digest)}",
            depends_on={"backbone_sha256": digest},
        ),
        measure=lambda images, targets: _measure(images, targets, network),
    )


@dataclass(frozen=True, kw_only=True)
class _Network:
    """Of each layer, float32: weight [O, I, k, k] and bias [O] of its convolution, and linear weights [1, O, 1, 1]."""

    weights: tuple[Any, ...]
    biases: tuple[Any, ...]
    linear: tuple[Any, ...]


def _measure(images: NDArray[np.float32], targets: NDArray[np.float32], network: _Network) -> NDArray[np.float64]:
    torch: Any = import_module("torch")
    with torch.inference_mode():
        pair = torch.from_numpy(np.concatenate([shown(images), shown(targets)]))
        distances = torch.zeros(len(images), dtype=torch.float64)
        for activation, linear in zip(_activations(pair, network), network.linear, strict=True):
            unit = activation / (activation.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)
            image, target = unit.chunk(2)
            distances += ((image - target).square() * linear).sum(dim=1).mean(dim=(1, 2))
    values: NDArray[np.float64] = distances.numpy()
    return values


def _activations(pixels: Any, network: _Network) -> Iterator[Any]:
    """Yield the five activations of AlexNet for [N, 3, h, w] in [-1, 1]."""
    torch: Any = import_module("torch")
    functional = torch.nn.functional
    current = (pixels - torch.tensor(_SHIFT).view(1, 3, 1, 1)) / torch.tensor(_SCALE).view(1, 3, 1, 1)
    for layer, weight, bias in zip(_LAYERS, network.weights, network.biases, strict=True):
        pooled = functional.max_pool2d(current, kernel_size=3, stride=2) if layer.pooled else current
        current = functional.conv2d(pooled, weight, bias, stride=layer.stride, padding=layer.padding).relu()
        yield current


def _read_network(backbone: Path) -> _Network:
    features, linear = _read_tensors(backbone), _read_tensors(_linear_weights())
    shapes = [layer.weight for layer in _LAYERS]
    names = [f"features.{layer.index}" for layer in _LAYERS]
    return _Network(
        weights=_take(features, backbone, {f"{name}.weight": shape for name, shape in zip(names, shapes, strict=True)}),
        biases=_take(
            features, backbone, {f"{name}.bias": shape[:1] for name, shape in zip(names, shapes, strict=True)}
        ),
        linear=_take(
            linear,
            _linear_weights(),
            {f"lin{index}.model.1.weight": (1, shape[0], 1, 1) for index, shape in enumerate(shapes)},
        ),
    )


def _take(tensors: Mapping[str, Any], file: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, ...]:
    """Return the named tensors as float32; raise `MetricError` for one that is missing or of another shape."""
    found = {name: tuple(getattr(tensors.get(name), "shape", ())) for name in shapes}
    wrong = [name for name, shape in shapes.items() if found[name] != shape]
    if wrong:
        raise MetricError(
            f"{file}: no weights of torchvision's AlexNet: {wrong[0]} is {list(found[wrong[0]]) or 'missing'}, "
            f"expected {list(shapes[wrong[0]])}; give alexnet-owt-{PUBLISHED_BACKBONE}.pth: --lpips-backbone FILE"
        )
    return tuple(tensors[name].float() for name in shapes)


def _read_tensors(file: Path) -> Mapping[str, Any]:
    torch: Any = import_module("torch")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise MetricError(f"{file}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise MetricError(f"{file}: not a file of torch weights, or damaged ({type(error).__name__})") from error
    return content if isinstance(content, dict) else {}


def cached_backbone() -> Path | None:
    """Return the AlexNet weights in torch's hub cache, torchvision's current file first; None where there are none."""
    files = sorted(_hub_folder().glob("alexnet-owt-*.pth"), key=lambda file: PUBLISHED_BACKBONE not in file.name)
    return files[0] if files else None


def _require_cached_backbone() -> Path:
    file = cached_backbone()
    if file is None:
        raise MetricError(
            f"no AlexNet weights in torch's hub cache ({_from_home(_hub_folder())}), and they are not downloaded; "
            f"give torchvision's alexnet-owt-{PUBLISHED_BACKBONE}.pth: --lpips-backbone FILE"
        )
    return file


def _hub_folder() -> Path:
    """Return where torch's hub keeps weights: as `torch.hub.get_dir`, without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(os.path.expanduser(home)) / "hub" / "checkpoints"


def _linear_weights() -> Path:
    """Return torchmetrics' copy of the lpips package's file v0.1/alex.pth."""
    spec = find_spec("torchmetrics")
    assert spec is not None  # asked for at opening
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*_LINEAR_WEIGHTS)


def _describe_backbone(backbone: Path, digest: str) -> str:
    kind = "torchvision's" if digest.startswith(PUBLISHED_BACKBONE) else "not torchvision's published file:"
    return f"backbone {kind} {backbone.name}, SHA-256 {digest[:16]}"


def _from_home(folder: Path) -> Path:
    """Return a folder as "~/...": reports are published, and a user's name is nobody's business."""
    return Path("~") / folder.relative_to(Path.home()) if folder.is_relative_to(Path.home()) else folder
