"""Distance of two faces by dlib's descriptor, from packages: dlib-bin and face-recognition-models."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from restyle_deploy.bench.metrics.base import (
    Gauge,
    Metric,
    MetricOptions,
    first_line,
    import_library,
    require_installed,
)
from restyle_deploy.errors import MetricError
from restyle_deploy.runtime.images import uint8_from_images

LEAST_SIDE = 256  # smaller images are enlarged: the detector finds faces from 80 px on
_LANDMARKS = "shape_predictor_5_face_landmarks.dat"
_INSTALL = "pip install 'restyle-deploy[dlib]'"
_REPAIR = "run: pip install --force-reinstall face-recognition-models"
_NETWORK = "dlib_face_recognition_resnet_model_v1.dat"

DLIB = Metric(
    name="dlib",
    label="dlib distance",
    unit="",
    decimals=3,
    higher_is_better=False,
    lowest=0.0,
    highest=None,
    definition="Distance of dlib's 128-D face descriptors; the face is found in the target. Missing where none is.",
    source="King 2017, blog.dlib.net (High Quality Face Recognition with Deep Metric Learning); dlib",
)


def open_dlib(options: MetricOptions, shape: tuple[int, int]) -> Gauge:
    """Open the Euclidean distance of dlib's face descriptors.

    The largest face is found in the target (HOG detector); five landmarks align it in the target and, starting from
    the same rectangle, in the image, whose own face need not be found. Both are pictures of 8 bits as they are saved,
    enlarged to a shorter side of 256 px where they are smaller. NaN where the target has no face.

    Range: 0 (the same) up, for two people about 0.6 to 1; below 0.6 dlib takes both for one person; lower is better.
    Source: D. King 2017, "High Quality Face Recognition with Deep Metric Learning"; the models are those that the
        face-recognition-models package holds.

    Raises:
        MetricError: a package is missing or cannot be imported, or a model is missing or damaged.
    """
    require_installed("dlib", "face_recognition_models", command=_INSTALL)
    dlib = import_library("dlib", command=_INSTALL)
    detector = dlib.get_frontal_face_detector()
    landmarks = _load(dlib.shape_predictor, _LANDMARKS)
    network = _load(dlib.face_recognition_model_v1, _NETWORK)

    def measure_pair(image: NDArray[np.uint8], target: NDArray[np.uint8]) -> float:
        faces = detector(target, 0)
        if not faces:
            return float("nan")
        face = max(faces, key=lambda found: found.area())
        first, second = (
            np.array(network.compute_face_descriptor(pixels, landmarks(pixels, face))) for pixels in (image, target)
        )
        return float(np.linalg.norm(first - second))

    def measure(images: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float64]:
        pairs = zip(_pictures(images), _pictures(targets), strict=True)
        return np.array([measure_pair(image, target) for image, target in pairs], np.float64)

    return Gauge(metric=DLIB, measure=measure)


def _pictures(images: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
    """Return [h, w, 3] of each image, enlarged to `LEAST_SIDE` where it is smaller."""
    height, width = images.shape[-2:]
    factor = max(1.0, LEAST_SIDE / min(height, width))
    size = (round(width * factor), round(height * factor))
    return [
        np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        for pixels in uint8_from_images(images)
    ]


def _load(read: Callable[[str], Any], name: str) -> Any:
    file = _model(name)
    try:
        return read(str(file))
    except RuntimeError as error:
        raise MetricError(f"{file}: dlib cannot read it: {first_line(error)}; {_REPAIR}") from error


def _model(name: str) -> Path:
    """Return the path of a model; importing its package would need pkg_resources, which setuptools has dropped."""
    spec = find_spec("face_recognition_models")
    assert spec is not None  # asked for at opening
    folders = [Path(folder) / "models" for folder in spec.submodule_search_locations or ()]
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise MetricError(f"face-recognition-models lacks {name}; {_REPAIR}")
    return found
