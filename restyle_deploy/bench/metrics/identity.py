"""Identity similarity: the cosine of two face embeddings, by any embedding model in ONNX."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from restyle_deploy.bench.metrics.base import Gauge, Metric, MetricOptions, first_line, import_library, shown
from restyle_deploy.bench.metrics.identity_input import IdentityInput, identity_input_from
from restyle_deploy.errors import MetricError

_ERRORS_ONLY = 3

IDENTITY = Metric(
    name="identity",
    label="Identity",
    unit="",
    decimals=3,
    higher_is_better=True,
    lowest=-1.0,
    highest=1.0,
    definition="Cosine of the face embeddings of image and target, of clipped values, neither detected nor aligned.",
    source="Deng et al. 2019 (ArcFace), arXiv:1801.07698; Huang et al. 2020 (CurricularFace), arXiv:2004.00288",
)

Embed = Callable[[NDArray[np.float32]], NDArray[np.float64]]


def open_identity(options: MetricOptions, shape: tuple[int, int]) -> Gauge:
    """Open identity similarity with the model of the options.

    Each image is clipped to [-1, 1], brought to [0, 1], cropped, resized (bilinear, antialiased) and normalised as the
    options or the sidecar say, and embedded; the value is the cosine of the two embeddings, NaN where one has no
    length. No face is detected and none is aligned, other than in upstream's scripts/calc_id_loss_parallel.py (MTCNN,
    then CurricularFace): both images have the alignment of the target, so give the crop that the model was trained on.
    Compare figures of one model and one crop only: the metric's `depends_on` records both, and how images are given.

    Range: -1 to 1 (the same direction); higher is better.
    Source: ArcFace, Deng et al. 2019, arXiv:1801.07698; CurricularFace, Huang et al. 2020, arXiv:2004.00288.

    Raises:
        MetricError: no model is given, ONNX Runtime is not installed, or the model cannot be read or is of another
            kind than images [N, 3, h, w] or [N, h, w, 3] of float32 -> embeddings [N, D].
    """
    if options.identity_model is None:
        raise MetricError("no face-embedding model is given: --identity-model FILE (ONNX); see docs/metrics.md")
    file = options.identity_model
    embed, wanted = _open_model(file, options)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Gauge(
        metric=replace(
            IDENTITY,
            source=f"{IDENTITY.source}; model {file.name}, SHA-256 {digest[:16]}",
            depends_on={
                "model_sha256": digest,
                **{name: list(getattr(wanted, name)) for name in ("size", "mean", "std", "crop")},
                "channels": wanted.channels,
            },
        ),
        measure=lambda images, targets: _cosines(embed(images), embed(targets)),
    )


def _open_model(file: Path, options: MetricOptions) -> tuple[Embed, IdentityInput]:
    """Return what embeds images [N, 3, h, w] in [-1, 1] as [N, D], and what the model is given for that."""
    session = _create_session(file)
    described = session.get_inputs()
    if len(described) != 1 or described[0].type != "tensor(float)":
        found = ", ".join(f"{item.name}: {item.type}" for item in described)
        raise MetricError(f"{file}: not a face-embedding model: inputs {found}; expected one of tensor(float)")
    wanted = identity_input_from(file, described[0].shape, options)

    def embed(images: NDArray[np.float32]) -> NDArray[np.float64]:
        prepared = prepare_images(images, wanted)
        step = wanted.batch or len(prepared)
        parts = [_run(session, file, prepared[first : first + step], step) for first in range(0, len(prepared), step)]
        return np.concatenate(parts)

    return embed, wanted


def prepare_images(images: NDArray[np.float32], wanted: IdentityInput) -> NDArray[np.float32]:
    """Return images [N, 3, h, w] in [-1, 1] as the model takes them: cropped, resized, normalised, in its layout."""
    cropped = _crop(shown(images), wanted.crop)
    planes = ((cropped + np.float32(1)) / np.float32(2)).reshape(-1, *cropped.shape[-2:])
    size = wanted.size[::-1]
    resized = np.stack(
        [np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)) for plane in planes]
    ).reshape(-1, 3, *wanted.size)
    ordered = resized[:, ::-1] if wanted.channels == "bgr" else resized
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (wanted.mean, wanted.std))
    normalized = (ordered - mean) / std
    return np.ascontiguousarray(normalized.transpose(0, 2, 3, 1) if wanted.is_channels_last else normalized, np.float32)


def _crop(images: NDArray[np.float32], crop: tuple[float, ...]) -> NDArray[np.float32]:
    """Return the part (top, left, bottom, right) of [..., H, W], in fractions; edges are rounded to whole pixels."""
    height, width = images.shape[-2:]
    top, left = min(round(crop[0] * height), height - 1), min(round(crop[1] * width), width - 1)
    bottom, right = max(round(crop[2] * height), top + 1), max(round(crop[3] * width), left + 1)
    return images[..., top:bottom, left:right]


def _create_session(file: Path) -> Any:
    ort = import_library("onnxruntime", command="pip install 'restyle-deploy[onnxruntime]'")
    settings = ort.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    if not file.is_file():
        raise MetricError(f"{file}: no such file; give a face-embedding model in ONNX: --identity-model FILE")
    try:
        return ort.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a class for each of its status codes, below Exception only
        raise MetricError(f"{file}: ONNX Runtime cannot open it: {first_line(error)}") from error


def _run(session: Any, file: Path, images: NDArray[np.float32], batch: int) -> NDArray[np.float64]:
    """Embed at most `batch` images; fewer are filled up with the last one, as a model of fixed batch needs."""
    missing = batch - len(images)
    filled = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
    try:
        embeddings = np.asarray(session.run(None, {session.get_inputs()[0].name: filled})[0])
    except Exception as error:  # as above
        raise MetricError(
            f"{file}: ONNX Runtime cannot run it on images {list(filled.shape)}: {first_line(error)}"
        ) from error
    if embeddings.ndim != 2 or len(embeddings) != batch or embeddings.shape[1] < 2 or embeddings.dtype.kind != "f":
        raise MetricError(
            f"{file}: not a face-embedding model: its first output is {list(embeddings.shape)} for {batch} images; "
            f"expected [{batch}, D], D >= 2, of floats (given is {embeddings.dtype})"
        )
    found: NDArray[np.float64] = embeddings[: len(images)].astype(np.float64)
    return found


def _cosines(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines: NDArray[np.float64] = (first * second).sum(axis=1) / lengths
    return cosines.clip(-1, 1)
