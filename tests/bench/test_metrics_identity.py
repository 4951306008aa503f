"""Identity similarity with tiny ONNX models whose embedding is the mean of each channel of what they are given."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper

from restyle_deploy.bench.metrics.base import MetricOptions
from restyle_deploy.bench.metrics.identity import open_identity, prepare_images
from restyle_deploy.bench.metrics.identity_input import IdentityInput
from restyle_deploy.errors import MetricError

SHAPE = (16, 24)
RED, BLUE = (1.0, -1.0, -1.0), (-1.0, -1.0, 1.0)
Side = int | str


def write_model(
    path: Path,
    shape: Sequence[Side] = ("N", 3, 8, 8),
    *,
    axes: tuple[int, ...] = (2, 3),
    keepdims: int = 0,
    dtype: int = TensorProto.FLOAT,
    extra: Sequence[Any] = (),
    output: str = "embedding",
    output_dtype: int | None = None,
) -> Path:
    """Write a model whose embedding is the mean over `axes` of its input; `extra` nodes may follow."""
    mean = helper.make_node("ReduceMean", ["image", "axes"], ["embedding"], keepdims=keepdims)
    graph = helper.make_graph(
        [mean, *extra],
        "embedder",
        [helper.make_tensor_value_info("image", dtype, shape)],
        [helper.make_tensor_value_info(output, output_dtype or dtype, None)],
        [helper.make_tensor("axes", TensorProto.INT64, [len(axes)], axes)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def flat_images(*colours: Sequence[float]) -> NDArray[np.float32]:
    """Return images of one colour each."""
    planes = np.array(colours, np.float32)[:, :, None, None]
    return np.ascontiguousarray(np.broadcast_to(planes, (len(colours), 3, *SHAPE)))


def cosine(first: ArrayLike, second: ArrayLike) -> float:
    return float(np.dot(first, second) / np.linalg.norm(first) / np.linalg.norm(second))


def test_value_is_the_cosine_of_the_embeddings(tmp_path: Path) -> None:
    gauge = open_identity(MetricOptions(identity_model=write_model(tmp_path / "face.onnx")), SHAPE)
    first, second = (0.5, -0.25, 1.0), (0.25, 0.75, -0.5)
    values = gauge.measure(flat_images(first, second, second), flat_images(first, first, [-value for value in second]))
    # With the default mean and deviation of 0.5, a model is given values in [-1, 1] as they are.
    assert values == pytest.approx([1, cosine(first, second), -1], abs=1e-6)


def test_values_are_clipped_and_those_without_length_are_missing(tmp_path: Path) -> None:
    gauge = open_identity(MetricOptions(identity_model=write_model(tmp_path / "face.onnx")), SHAPE)
    values = gauge.measure(flat_images((3, 1, 1), (0, 0, 0)), flat_images((1, 1, 1), (1, 1, 1)))
    assert values[0] == pytest.approx(1)
    assert np.isnan(values[1])


def test_mean_deviation_and_order_of_channels_are_applied(tmp_path: Path) -> None:
    options = MetricOptions(
        identity_model=write_model(tmp_path / "face.onnx"),
        identity_mean=(0.1, 0.2, 0.3),
        identity_std=(0.5, 0.25, 1.0),
        identity_channels="bgr",
    )
    embeddings = [
        (np.array(colour)[::-1] - (0.1, 0.2, 0.3)) / (0.5, 0.25, 1.0) for colour in ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    ]
    value = open_identity(options, SHAPE).measure(flat_images(RED), flat_images(BLUE))
    assert value == pytest.approx(cosine(*embeddings), abs=1e-6)


def test_only_the_crop_is_embedded(tmp_path: Path) -> None:
    images, targets = flat_images(RED), flat_images(RED)
    images[:, :, :, :12], targets[:, :, 8:, :] = flat_images(BLUE)[:, :, :, :12], flat_images(BLUE)[:, :, 8:, :]
    file = write_model(tmp_path / "face.onnx")
    right_top = MetricOptions(identity_model=file, identity_crop=(0, 0.5, 0.5, 1))
    left_bottom = MetricOptions(identity_model=file, identity_crop=(0.5, 0, 1, 0.5))
    right = MetricOptions(identity_model=file, identity_crop=(0, 0.5, 1, 1))
    assert open_identity(right_top, SHAPE).measure(images, targets) == pytest.approx(1)
    assert open_identity(left_bottom, SHAPE).measure(images, targets) == pytest.approx(1)
    thin = MetricOptions(identity_model=file, identity_crop=(0.999, 0, 1, 0.001))
    assert open_identity(thin, SHAPE).measure(images, targets) == pytest.approx(1)
    half = (np.array(RED) + np.array(BLUE)) / 2
    assert open_identity(right, SHAPE).measure(images, targets) == pytest.approx(cosine(RED, half), abs=1e-6)


def test_images_are_resized_as_torch_does_with_antialiasing() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 48, 64)).astype(np.float32)
    wanted = IdentityInput(
        size=(20, 28),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        channels="rgb",
        crop=(0, 0, 1, 1),
        is_channels_last=False,
        batch=None,
    )
    expected = torch.nn.functional.interpolate(
        torch.from_numpy((images + 1) / 2), (20, 28), mode="bilinear", antialias=True, align_corners=False
    )
    assert prepare_images(images, wanted) == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_model_of_channels_last_and_a_fixed_batch_gives_the_same(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images, targets = (random.uniform(-1, 1, (5, 3, *SHAPE)).astype(np.float32) for _ in range(2))
    usual = write_model(tmp_path / "usual.onnx")
    last = write_model(tmp_path / "last.onnx", ("N", 8, 8, 3), axes=(1, 2))
    fixed = write_model(tmp_path / "fixed.onnx", (2, 3, 8, 8))
    values = [
        open_identity(MetricOptions(identity_model=file), SHAPE).measure(images, targets)
        for file in (usual, last, fixed)
    ]
    assert values[1] == pytest.approx(values[0], abs=1e-6)
    assert values[2] == pytest.approx(values[0], abs=1e-6)


def test_options_win_over_the_sidecar(tmp_path: Path) -> None:
    file = write_model(tmp_path / "face.onnx", ("N", 3, "h", "w"))
    sidecar = {"size": [6, 4], "mean": [0, 0, 0], "std": [1, 1, 1], "channels": "bgr", "crop": [0, 0, 0.5, 1]}
    (tmp_path / "face.json").write_text(json.dumps(sidecar))
    images, targets = flat_images((1.0, 0.0, -1.0)), flat_images((-1.0, 0.5, 0.0))
    by_sidecar = open_identity(MetricOptions(identity_model=file), SHAPE).measure(images, targets)
    assert by_sidecar == pytest.approx(cosine((0, 0.5, 1), (0.5, 0.75, 0)), abs=1e-6)
    options = MetricOptions(
        identity_model=file,
        identity_size=(3, 3),
        identity_mean=(0.5, 0.5, 0.5),
        identity_std=(0.5, 0.5, 0.5),
        identity_channels="rgb",
        identity_crop=(0, 0, 1, 1),
    )
    by_options = open_identity(options, SHAPE).measure(images, targets)
    assert by_options == pytest.approx(cosine((1, 0, -1), (-1, 0.5, 0)), abs=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "face.json: not a JSON file"),
        ("[1]", "expected an object with some of size, mean, std, crop, channels, got"),
        ('{"input": 112}', "expected an object with some of"),
        ('{"size": [112]}', r"size is \[112\], expected 2 numbers"),
        ('{"mean": 0.5}', "mean is 0.5, expected 3 numbers"),
        ('{"std": [1, 1, true]}', "std is .* expected 3 numbers"),
        ('{"channels": "yuv"}', 'channels is "yuv", expected rgb or bgr'),
        ('{"std": [1, 1, 0]}', "expected numbers above 0"),
        ('{"crop": [0.5, 0, 0.5, 1]}', "expected 0 <= top < bottom <= 1"),
        ('{"size": [112, 112]}', "takes images of 8x8 pixels, but 112x112 was asked for"),
    ],
)
def test_bad_sidecars_are_refused(content: str, message: str, tmp_path: Path) -> None:
    file = write_model(tmp_path / "face.onnx")
    (tmp_path / "face.json").write_text(content)
    with pytest.raises(MetricError, match=message):
        open_identity(MetricOptions(identity_model=file), SHAPE)


def test_an_unreadable_sidecar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "face.json").mkdir()
    with pytest.raises(MetricError, match="face.json: cannot be read"):
        open_identity(MetricOptions(identity_model=write_model(tmp_path / "face.onnx")), SHAPE)


def test_a_model_of_any_size_needs_one(tmp_path: Path) -> None:
    file = write_model(tmp_path / "face.onnx", ("N", 3, "h", 8))
    with pytest.raises(MetricError, match="say which: --identity-size 112 112"):
        open_identity(MetricOptions(identity_model=file), SHAPE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": ("N", 12), "axes": (1,)}, r"its input is \['N', 12\]; expected \[N, 3, h, w\] or \[N, h, w, 3\]"),
        ({"shape": ("N", 4, 8, 8)}, "expected \\[N, 3, h, w\\]"),
        ({"dtype": TensorProto.DOUBLE}, r"inputs image: tensor\(double\); expected one of tensor\(float\)"),
    ],
)
def test_models_of_other_inputs_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_model(tmp_path / "face.onnx", **changes)
    with pytest.raises(MetricError, match=message):
        open_identity(MetricOptions(identity_model=file), SHAPE)


def test_models_of_other_outputs_are_refused(tmp_path: Path) -> None:
    file = write_model(tmp_path / "face.onnx", keepdims=1)
    gauge = open_identity(MetricOptions(identity_model=file), SHAPE)
    with pytest.raises(MetricError, match=r"output is \[1, 3, 1, 1\] for 1 images; expected \[1, D\], D >= 2"):
        gauge.measure(flat_images(RED), flat_images(RED))


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.STRING])
def test_models_whose_output_holds_no_floats_are_refused(tmp_path: Path, kind: int) -> None:
    cast = helper.make_node("Cast", ["embedding"], ["classes"], to=kind)
    file = write_model(tmp_path / "face.onnx", extra=[cast], output="classes", output_dtype=kind)
    gauge = open_identity(MetricOptions(identity_model=file), SHAPE)
    with pytest.raises(MetricError, match="expected .* of floats"):
        gauge.measure(flat_images(RED), flat_images(RED))


def test_a_model_that_fails_is_told(tmp_path: Path) -> None:
    reshape = helper.make_node("Reshape", ["embedding", "axes"], ["reshaped"])  # to [2, 3], which does not fit
    file = write_model(tmp_path / "face.onnx", extra=[reshape], output="reshaped")
    gauge = open_identity(MetricOptions(identity_model=file), SHAPE)
    with pytest.raises(MetricError, match=r"cannot run it on images \[1, 3, 8, 8\]"):
        gauge.measure(flat_images(RED), flat_images(RED))


def test_missing_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(MetricError, match="no face-embedding model is given: --identity-model FILE"):
        open_identity(MetricOptions(), SHAPE)
    file = tmp_path / "face.onnx"
    with pytest.raises(MetricError, match=r"face.onnx: no such file"):
        open_identity(MetricOptions(identity_model=file), SHAPE)
    file.write_bytes(b"no model")
    with pytest.raises(MetricError, match=r"face.onnx: ONNX Runtime cannot open it"):
        open_identity(MetricOptions(identity_model=file), SHAPE)


def test_missing_onnxruntime_is_told_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_model(tmp_path / "face.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MetricError, match=r"onnxruntime is not .*pip install 'restyle-deploy\[onnxruntime\]'"):
        open_identity(MetricOptions(identity_model=file), SHAPE)


def test_the_source_names_the_model(tmp_path: Path) -> None:
    gauge = open_identity(MetricOptions(identity_model=write_model(tmp_path / "face.onnx")), SHAPE)
    assert "model face.onnx, SHA-256 " in gauge.metric.source


def test_all_that_figures_depend_on_is_recorded(tmp_path: Path) -> None:
    file = write_model(tmp_path / "face.onnx")
    options = MetricOptions(identity_model=file, identity_channels="bgr", identity_crop=(0, 0, 0.5, 1))
    found = open_identity(options, SHAPE).metric.depends_on
    assert found == {
        "model_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "size": [8, 8],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop": [0, 0, 0.5, 1],
        "channels": "bgr",
    }
    assert json.loads(json.dumps(found)) == found
