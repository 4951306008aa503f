"""A directory with `manifest.json` <-> `Bundle`. This module owns the format and its version."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.engines import (
    ENGINES,
    DamagedEngine,
    build_command,
    engine_as_json,
    engine_from_json,
    engines_from_json,
    key_of_record,
    quote_path,
    without_targets,
)
from restyle_deploy.engines import EngineRecord as EngineRecord  # a bundle's records are part of its module
from restyle_deploy.engines import GraphRecord as GraphRecord
from restyle_deploy.errors import BundleError
from restyle_deploy.files import replace_when_complete, sha256_of_file
from restyle_deploy.manifest import check_hashes, path_inside, read_json, specs_from_json, typed
from restyle_deploy.model_config import ModelConfig, graph_specs

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
GRAPHS = ("encoder", "generator")
LATENT_AVG = "latent_avg.npy"
AVERAGE_IMAGE = "average_image.npy"
EXPECTATION = "expectation.npz"
_ARRAYS = (LATENT_AVG, AVERAGE_IMAGE, EXPECTATION)
# All that lies in a bundle's directory.
FILES = frozenset({MANIFEST, ENGINES, *_ARRAYS, *(f"{name}.onnx" for name in GRAPHS)})
_SIZES = ("output_size", "input_size", "style_dim", "mapping_layers")
_EXPORT_AGAIN = "export the bundle again"


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
        damaged_engines: records of the manifest that cannot be used; `find_engine` refuses them.
        verification: what the export measured.
    """

    path: Path
    config: ModelConfig
    checkpoint_sha256: str
    graphs: Mapping[str, GraphRecord]
    latent_avg: NDArray[np.float32]
    average_image: NDArray[np.float32]
    expectation: Path
    engines: tuple[EngineRecord, ...]
    verification: Mapping[str, Any]
    damaged_engines: tuple[DamagedEngine, ...] = ()


def open_bundle(directory: str | Path) -> Bundle:
    """Read a bundle and check all but its engines against the hashes.

    Raises:
        BundleError: see `read_bundle` and `check_graphs`.
    """
    bundle = read_bundle(directory)
    check_graphs(bundle)
    return bundle


def read_bundle(directory: str | Path) -> Bundle:
    """Read a bundle; its arrays are checked against their hashes, its graphs and engines are not.

    Raises:
        BundleError: no bundle, an unknown format, a damaged manifest, a missing or changed array, or a path that
            leaves the directory.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    try:
        config = _config_from_json(manifest["model"])
        arrays = {name: _file_from_json(directory, manifest["arrays"][name]) for name in _ARRAYS}
        graphs = {name: _graph_from_json(directory, name, manifest["graphs"][name], config) for name in GRAPHS}
        engines, damaged = engines_from_json(directory, typed(manifest, "engines", list), config)
        check_hashes(dict(arrays.values()), since="export", mend=_EXPORT_AGAIN)
        return Bundle(
            path=directory,
            config=config,
            checkpoint_sha256=typed(manifest, "checkpoint_sha256", str),
            graphs=graphs,
            latent_avg=_load_array(arrays[LATENT_AVG][0], (config.n_styles, config.style_dim)),
            average_image=_load_array(arrays[AVERAGE_IMAGE][0], (3, *config.input_shape)),
            expectation=arrays[EXPECTATION][0],
            engines=engines,
            verification=typed(manifest, "verification", dict),
            damaged_engines=damaged,
        )
    except (KeyError, TypeError, ValueError, AttributeError, EOFError) as error:
        raise BundleError(
            f"{directory / MANIFEST}: damaged ({type(error).__name__}: {error}); {_EXPORT_AGAIN}"
        ) from error


def check_graphs(bundle: Bundle) -> None:
    """Check the exported graphs against their hashes.

    Raises:
        BundleError: one is missing or has changed.
    """
    expected = {graph.path: graph.sha256 for graph in bundle.graphs.values()}
    check_hashes(expected, since="export", mend=_EXPORT_AGAIN)


def find_engine(bundle: Bundle, *, backend: str, device: str, precision: str) -> EngineRecord | None:
    """Return the bundle's engine for these, if it has one; `check_engine` tells whether it can be used.

    Raises:
        BundleError: its record is damaged; the message names the command that builds it again.
    """
    key = (backend, device, precision)
    for damaged in bundle.damaged_engines:
        if damaged.key == key:
            mend = _build_again(build_command(bundle.path, backend=backend, device=device, precision=precision))
            raise BundleError(
                f"{bundle.path}: the record of the engine {damaged.name} is damaged: {damaged.reason}; {mend}"
            )
    return {engine.key: engine for engine in bundle.engines}.get(key)


def check_engine(
    bundle: Bundle,
    engine: EngineRecord,
    *,
    library_versions: Mapping[str, str],
    processors: Collection[str],
    plugin_hash: str | None = None,
    roles: Collection[str] | None = None,
) -> None:
    """Check that an engine of the bundle can be used here.

    Args:
        bundle: the bundle.
        engine: one of its engines.
        library_versions: of the backend here.
        processors: those whose engines run here, by the backend.
        plugin_hash: of the kernels that the backend would put into an engine now; None where it has none.
        roles: the graphs that will be used, to hash no other's files; None for all.
    Raises:
        BundleError: it was built with another library, for another processor, from other graphs or with other kernels,
            or a file is missing or has changed; the message names the command that builds it again.
    """
    differences = []
    if not engine.fits_versions(library_versions):
        ours, theirs = (
            ", ".join(f"{name} {version}" for name, version in versions.items())
            for versions in (library_versions, engine.library_versions)
        )
        differences.append(f"it was built with {theirs}, here is {ours}")
    if not engine.runs_on(processors):
        differences.append(f"it was built for {engine.processor}, this is {', '.join(processors)}")
    if dict(engine.sources) != {name: graph.sha256 for name, graph in bundle.graphs.items()}:
        differences.append("it was built from other graphs than the bundle's")
    if engine.build.get("plugin_hash") not in (None, plugin_hash):
        differences.append("it holds the kernels of another release")
    if differences:
        mend = how_to_build_again(bundle, engine, is_for_here=engine.runs_on(processors))
        raise BundleError(f"{engine.directory}: the engine cannot be used: {'; '.join(differences)}; {mend}")
    check_engine_files(bundle, engine, roles=roles)


def check_engine_files(bundle: Bundle, engine: EngineRecord, *, roles: Collection[str] | None = None) -> None:
    """Check an engine's files against their hashes, wherever it can be used; `roles` as for `check_engine`.

    Raises:
        BundleError: one is missing or has changed.
    """
    expected = engine.files_of(engine.graphs if roles is None else roles)
    check_hashes(expected, since="build", mend=how_to_build_again(bundle, engine))


def how_to_build_again(bundle: Bundle, engine: EngineRecord, *, is_for_here: bool = True) -> str:
    """Return what to do about an engine that cannot be used, for messages.

    The command has all its options; of an engine that is not for here, none that says what it is for.
    """
    backend, device, precision = engine.key
    options = engine.build.get("options", ())
    others = [
        *(["--tune"] if engine.plan["origin"] == "tuned" else []),
        *(options if is_for_here else without_targets(options)),
    ]
    return _build_again(build_command(bundle.path, backend=backend, device=device, precision=precision, others=others))


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


def write_engine(directory: Path, record: EngineRecord) -> None:
    """Add an engine to a manifest, or replace the one for the same backend, device and precision.

    The new manifest takes the old one's place once it is complete. No file is hashed. Damaged records stay, unless they
    state the same key or directory, or no key at all. Hold the bundle's lock (`files.hold_lock`) where other processes
    may write.

    Args:
        directory: the bundle.
        record: describes files that lie in `record.directory`, inside `directory`.
    Raises:
        BundleError: no bundle, or a path leaves the engine's directory.
        KeyError, TypeError, ValueError: the record holds what `read_bundle` refuses.
    """
    manifest = _read_manifest(directory)
    added = engine_as_json(record, directory)
    config = _config_from_json(manifest["model"])
    engine_from_json(directory, json.loads(json.dumps(added)), config)
    engines = [
        other
        for other in typed(manifest, "engines", list)
        if key_of_record(other) not in (None, record.key) and other.get("directory") != added["directory"]
    ]
    _write_json(directory / MANIFEST, {**manifest, "engines": [*engines, added]})


def write_verification(directory: Path, verification: Mapping[str, Any]) -> None:
    """Add to a manifest what the export measured; the files are not hashed again."""
    _write_json(directory / MANIFEST, {**_read_manifest(directory), "verification": dict(verification)})


def _write_json(path: Path, manifest: Mapping[str, Any]) -> None:
    with replace_when_complete(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        what = "a file, and a bundle is a directory" if directory.is_file() else f"{MANIFEST} is missing"
        output = "DIRECTORY" if directory.exists() else quote_path(directory)
        raise BundleError(f"{directory}: no bundle ({what}); make one: restyle-deploy export CHECKPOINT -o {output}")
    try:
        manifest = read_json(path)
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


def _file_from_json(directory: Path, record: Mapping[str, Any]) -> tuple[Path, str]:
    return path_inside(directory, typed(record, "file", str), of="bundle"), typed(record, "sha256", str)


def _build_again(command: str) -> str:
    return f"build it again: {command}, or run the exported graphs: --plain (plain=True)"


def _config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    for key in _SIZES:
        typed(values, key, int)
    channels = {int(size): count for size, count in values["generator_channels"].items()}
    widths, units = (tuple(values[key]) for key in ("encoder_widths", "encoder_units"))
    return ModelConfig(**{**values, "generator_channels": channels, "encoder_widths": widths, "encoder_units": units})


def _graph_from_json(directory: Path, name: str, record: Mapping[str, Any], config: ModelConfig) -> GraphRecord:
    path, sha256 = _file_from_json(directory, record)
    inputs, outputs = specs_from_json(record, "inputs"), specs_from_json(record, "outputs")
    if (inputs, outputs) != graph_specs(config)[name]:
        raise ValueError(f"the inputs or outputs of the {name} do not fit the model")
    return GraphRecord(path=path, sha256=sha256, inputs=inputs, outputs=outputs)


def _load_array(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.load(path, allow_pickle=False)
    if array.shape != shape or array.dtype != np.float32:
        raise BundleError(f"{path}: got {array.dtype} {list(array.shape)}, expected float32 {list(shape)}")
    return np.ascontiguousarray(array)
