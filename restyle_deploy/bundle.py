"""A directory with `manifest.json` <-> `Bundle`. This module owns the format and its version."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.errors import BundleError
from restyle_deploy.files import sha256_of_file
from restyle_deploy.model_config import ModelConfig, graph_specs
from restyle_deploy.tensors import TensorSpec

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
GRAPHS = ("encoder", "generator")
LATENT_AVG = "latent_avg.npy"
AVERAGE_IMAGE = "average_image.npy"
EXPECTATION = "expectation.npz"
ENGINES = "engines"
_ARRAYS = (LATENT_AVG, AVERAGE_IMAGE, EXPECTATION)
# All that lies in a bundle's directory.
FILES = frozenset({MANIFEST, ENGINES, *_ARRAYS, *(f"{name}.onnx" for name in GRAPHS)})
_SIZES = ("output_size", "input_size", "style_dim", "mapping_layers")

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """A graph of a bundle: its file, the file's hash, and its border."""

    path: Path
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: the directory.
        config: the architecture.
        checkpoint_sha256: of the checkpoint that it was exported from.
        graphs: `encoder` and `generator`.
        latent_avg: [n_styles, style_dim] float32.
        average_image: [3, H, W] float32, the current image of the first step.
        expectation: the file with inputs and the results that the reference model gave for them.
        engines: a record per engine; empty until one is built.
        verification: what the export measured.
    """

    path: Path
    config: ModelConfig
    checkpoint_sha256: str
    graphs: Mapping[str, GraphRecord]
    latent_avg: NDArray[np.float32]
    average_image: NDArray[np.float32]
    expectation: Path
    engines: tuple[Mapping[str, Any], ...]
    verification: Mapping[str, Any]


def open_bundle(directory: str | Path) -> Bundle:
    """Read a bundle and check every file of it against its hash.

    Raises:
        BundleError: no bundle, an unknown format, a missing or changed file, or one outside the directory.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    try:
        config = _config_from_json(manifest["model"])
        graphs = {name: _graph_from_json(directory, name, manifest["graphs"][name], config) for name in GRAPHS}
        arrays = {name: _check_file(directory, manifest["arrays"][name]) for name in _ARRAYS}
        return Bundle(
            path=directory,
            config=config,
            checkpoint_sha256=_typed(manifest, "checkpoint_sha256", str),
            graphs=graphs,
            latent_avg=_load_array(arrays[LATENT_AVG], (config.n_styles, config.style_dim)),
            average_image=_load_array(arrays[AVERAGE_IMAGE], (3, *config.input_shape)),
            expectation=arrays[EXPECTATION],
            engines=tuple(dict(engine) for engine in _typed(manifest, "engines", list)),
            verification=_typed(manifest, "verification", dict),
        )
    except (KeyError, TypeError, ValueError, AttributeError, EOFError) as error:
        raise BundleError(
            f"{directory / MANIFEST}: damaged ({type(error).__name__}: {error}); export the bundle again"
        ) from error


def write_manifest(directory: Path, *, config: ModelConfig, checkpoint_sha256: str) -> None:
    """Describe the files that lie in `directory`: `encoder.onnx`, `generator.onnx` and the arrays.

    Args:
        directory: a bundle in the making; its manifest is written or replaced, without a verification.
        config: the architecture.
        checkpoint_sha256: of the checkpoint.
    """
    graphs = {
        name: {
            **_record_of_file(directory, f"{name}.onnx"),
            "inputs": [asdict(spec) for spec in inputs],
            "outputs": [asdict(spec) for spec in outputs],
        }
        for name, (inputs, outputs) in graph_specs(config).items()
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "model": asdict(config),
        "checkpoint_sha256": checkpoint_sha256,
        "graphs": graphs,
        "arrays": {name: _record_of_file(directory, name) for name in _ARRAYS},
        "engines": [],
        "verification": {},
    }
    _write_json(directory / MANIFEST, manifest)


def write_verification(directory: Path, verification: Mapping[str, Any]) -> None:
    """Add to a manifest what the export measured; the files are not hashed again."""
    _write_json(directory / MANIFEST, {**_read_manifest(directory), "verification": dict(verification)})


def _write_json(path: Path, manifest: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{directory}: no bundle ({MANIFEST} is missing); make one: restyle-deploy export CHECKPOINT -o {directory}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error}); export the bundle again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version is {version!r}, this release reads {FORMAT_VERSION}; "
            "use the release that wrote it, or export the bundle again"
        )
    return dict(manifest)


def _record_of_file(directory: Path, name: str) -> dict[str, str]:
    return {"file": name, "sha256": sha256_of_file(directory / name)}


def _check_file(directory: Path, record: Mapping[str, str]) -> Path:
    path = directory / record["file"]
    if not path.resolve().is_relative_to(directory.resolve()):
        raise BundleError(f"{directory / MANIFEST}: {record['file']} lies outside the bundle")
    if not path.is_file():
        raise BundleError(f"{path}: missing; export the bundle again")
    found = sha256_of_file(path)
    if found != record["sha256"]:
        raise BundleError(
            f"{path}: changed since the export (sha256 {found[:12]}…, expected {record['sha256'][:12]}…); "
            "export the bundle again"
        )
    return path


def _typed(values: Mapping[str, Any], key: str, kind: type[Value]) -> Value:
    value = values[key]
    if not isinstance(value, kind):
        raise TypeError(f"{key} is {value!r}, expected {kind.__name__}")
    return value


def _config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    for key in _SIZES:
        _typed(values, key, int)
    channels = {int(size): count for size, count in values["generator_channels"].items()}
    widths, units = (tuple(values[key]) for key in ("encoder_widths", "encoder_units"))
    return ModelConfig(**{**values, "generator_channels": channels, "encoder_widths": widths, "encoder_units": units})


def _graph_from_json(directory: Path, name: str, record: Mapping[str, Any], config: ModelConfig) -> GraphRecord:
    inputs, outputs = (
        tuple(TensorSpec(name=spec["name"], dtype=spec["dtype"], shape=tuple(spec["shape"])) for spec in record[side])
        for side in ("inputs", "outputs")
    )
    if (inputs, outputs) != graph_specs(config)[name]:
        raise ValueError(f"the inputs or outputs of the {name} do not fit the model")
    return GraphRecord(path=_check_file(directory, record), sha256=record["sha256"], inputs=inputs, outputs=outputs)


def _load_array(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.load(path, allow_pickle=False)
    if array.shape != shape or array.dtype != np.float32:
        raise BundleError(f"{path}: got {array.dtype} {list(array.shape)}, expected float32 {list(shape)}")
    return np.ascontiguousarray(array)
