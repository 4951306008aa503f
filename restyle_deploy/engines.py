"""An engine's record in a bundle's manifest <-> `EngineRecord`."""

import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from restyle_deploy.errors import BundleError
from restyle_deploy.manifest import (
    build_from_json,
    path_inside,
    plan_from_json,
    specs_from_json,
    texts_from_json,
    typed,
)
from restyle_deploy.model_config import ModelConfig, graph_specs
from restyle_deploy.tensors import BATCH, TensorSpec

ENGINES = "engines"
TARGET_FEATURES = "target_features"
# Beside an engine's graph: its layers, for people.
LAYERS_SUFFIX = ".layers.json"
# Files of this suffix are no part of an engine: what a run keeps for the next one.
CACHE_SUFFIX = ".cache"
# Between the processors that an engine was built for, where they are several.
_ALTERNATIVE = " or "

# Images of one run: the fewest, and the most; None for any number.
Batches = tuple[int, int | None]
ANY_BATCH: Batches = (1, None)
# Options that name processors: an engine that does not run on this one is built again without them.
_TARGET_OPTIONS = {"--compute-capability": 1, "--hardware-compatible": 0}  # and how many values each has

Border = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]


@dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """A graph of a bundle or of an engine: its file, the file's hash, and its border."""

    path: Path
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """The graphs of a bundle as a backend has prepared them for one kind of machine.

    Attributes:
        backend, device, precision: what it was built for; a bundle has one engine for each.
        directory: holds its files; inside the bundle's `engines`.
        graphs: by role. `encoder` and `generator` always. `target` gives `target_features` for a target, and the
            encoder then takes these instead. `preview` gives `current` for a latent, without the image.
        files: the SHA-256 of every file, by its name in the directory.
        library_versions: of the backend that built it.
        processor: what it was built for: one that its backend's `processors` names, or several joined by " or ".
        sources: the SHA-256 of the bundle's graphs that it was made from, by name.
        batch: 1 when its graphs take one image at a time, None when any number.
        plan: how each site of the graphs is computed, in plain values: `origin` (`tuned` or `table`), `choices`
            {site: choice}, `measurements` {site: {choice: ms}} and the `seconds` that these took.
        build: how the backend built it, in plain values: `verified`, whether its results were compared with the
            reference model's, the `reason` where they were not, and what else the backend states.
    """

    backend: str
    device: str
    precision: str
    directory: Path
    graphs: Mapping[str, GraphRecord]
    files: Mapping[str, str]
    library_versions: Mapping[str, str]
    processor: str
    sources: Mapping[str, str]
    batch: int | None
    plan: Mapping[str, Any]
    build: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        """Backend, device and precision."""
        return self.backend, self.device, self.precision

    @property
    def batches(self) -> Batches:
        """See `batches_of_build`."""
        return batches_of_build(self.build)

    def runs_on(self, processors: Collection[str]) -> bool:
        """Whether it was built for one of these processors."""
        return self.processor in processors or not set(processors).isdisjoint(self.processor.split(_ALTERNATIVE))

    def fits_versions(self, versions: Mapping[str, str]) -> bool:
        """Whether it runs with these: those that built it, or later ones of the same major where it allows them."""
        if dict(self.library_versions) == dict(versions):
            return True
        if not self.build.get("version_compatible") or set(self.library_versions) != set(versions):
            return False
        pairs = ((_numbers_in(self.library_versions[name]), _numbers_in(versions[name])) for name in versions)
        return all(built[:1] == here[:1] and built <= here for built, here in pairs)

    def files_of(self, roles: Collection[str]) -> dict[Path, str]:
        """Return the files, with their SHA-256, that graphs of these roles may need.

        A file belongs to a graph when its name begins with the stem of the graph's file; one that belongs to no graph
        may be needed by any.
        """
        stems = {role: graph.path.with_suffix("").relative_to(self.directory) for role, graph in self.graphs.items()}
        used = tuple(stem.as_posix() for role, stem in stems.items() if role in roles)
        unused = tuple(stem.as_posix() for role, stem in stems.items() if role not in roles)
        return {
            self.directory / name: sha256
            for name, sha256 in self.files.items()
            if name.startswith(used) or not name.startswith(unused)
        }


@dataclass(frozen=True, kw_only=True)
class DamagedEngine:
    """A record that describes no engine.

    Attributes:
        name: the directory that it states, else its place among the records.
        key: backend, device and precision, where it states them.
        reason: what is wrong with it.
    """

    name: str
    key: tuple[str, str, str] | None
    reason: str


def batches_of_build(build: Mapping[str, Any]) -> Batches:
    """Return the fewest and the most images of one run, by what a backend states of an engine.

    Raises:
        KeyError, TypeError, ValueError: it states them in another way.
    """
    if "profile" not in build:
        return ANY_BATCH
    profile = typed(build, "profile", dict)
    least, most = typed(profile, "min", int), typed(profile, "max", int)
    if not 1 <= least <= most:
        raise ValueError(f"the profile is {least} to {most}, expected 1 <= min <= max")
    return least, most


def without_targets(arguments: Iterable[str]) -> list[str]:
    """Return the options of a build, as a command line has them, less those that name processors."""
    kept, skipped = [], 0
    for argument in arguments:
        if argument in _TARGET_OPTIONS:
            skipped = 1 + _TARGET_OPTIONS[argument]
        if not skipped:
            kept.append(argument)
        skipped = max(0, skipped - 1)
    return kept


def join_processors(processors: Collection[str]) -> str:
    """Return what an engine's record has as `processor` when it was built for several."""
    return _ALTERNATIVE.join(processors)


def engine_directory(bundle: Path, *, backend: str, device: str, precision: str) -> Path:
    """Return where in a bundle an engine's files lie."""
    return bundle / ENGINES / f"{backend}-{device.replace(':', '')}-{precision}"


def build_command(bundle: Path, *, backend: str, device: str, precision: str, others: Iterable[str] = ()) -> str:
    """Return the command that builds an engine, for messages; options that have their default are left out.

    Args:
        bundle: the directory.
        backend, device, precision: of the engine.
        others: further options, as a command line has them, not quoted.
    """
    options = "" if device == "cpu" else f" --device {device}"
    options += "" if precision == "fp32" else f" --precision {precision}"
    options += "".join(f" {shlex.quote(text)}" for text in others)
    return f"restyle-deploy build {quote_path(bundle)} --backend {backend}{options}"


def quote_path(path: Path) -> str:
    """Return a path as a command in a message has it: quoted for a shell, and never like an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def describe_engine(engine: EngineRecord) -> str:
    """Return what an engine is for, and the options that it was built with, for messages."""
    profile, options = engine.build.get("profile"), engine.build.get("options")
    batches = f", batches {profile['min']} to {profile['max']}" if profile else ""
    built = f", built with {shlex.join(options)}" if options else ""
    return f"the engine for {engine.processor}{batches}{built}"


def engine_as_json(engine: EngineRecord, bundle: Path) -> dict[str, Any]:
    """Return an engine's record as the manifest of the bundle in this directory has it."""
    return {
        "backend": engine.backend,
        "device": engine.device,
        "precision": engine.precision,
        "directory": engine.directory.relative_to(bundle).as_posix(),
        "graphs": {
            role: {
                "file": graph.path.relative_to(engine.directory).as_posix(),
                "sha256": graph.sha256,
                "inputs": [asdict(spec) for spec in graph.inputs],
                "outputs": [asdict(spec) for spec in graph.outputs],
            }
            for role, graph in engine.graphs.items()
        },
        "files": dict(engine.files),
        "library_versions": dict(engine.library_versions),
        "processor": engine.processor,
        "sources": dict(engine.sources),
        "batch": engine.batch,
        "plan": dict(engine.plan),
        "build": dict(engine.build),
    }


def engine_from_json(bundle: Path, record: Mapping[str, Any], config: ModelConfig) -> EngineRecord:
    """Read an engine's record; no file is looked at.

    Args:
        bundle: the bundle's directory.
        record: what `engine_as_json` returned, perhaps changed since.
        config: the model, which the graphs have to fit.
    Raises:
        BundleError: a path leaves the engine's directory, or this the bundle's `engines`.
        KeyError, TypeError, ValueError: something is missing, of another type, or does not fit.
    """
    stated = typed(record, "directory", str)
    directory = path_inside(bundle, stated, of="bundle's engines", within=bundle / ENGINES)
    files = texts_from_json(record, "files")
    for name in files:
        path_inside(directory, name, of=f"engine {stated}")
    batch = record["batch"]
    if batch is not None and (type(batch) is not int or batch != 1):
        raise ValueError(f"the batch of {stated} is {batch!r}, expected 1 or null")
    graphs = {role: _graph_from_json(directory, graph, files) for role, graph in typed(record, "graphs", dict).items()}
    build = build_from_json(record)
    batches_of_build(build)
    _check_borders({role: (graph.inputs, graph.outputs) for role, graph in graphs.items()}, config, batch)
    return EngineRecord(
        backend=typed(record, "backend", str),
        device=typed(record, "device", str),
        precision=typed(record, "precision", str),
        directory=directory,
        graphs=graphs,
        files=files,
        library_versions=texts_from_json(record, "library_versions"),
        processor=typed(record, "processor", str),
        sources=texts_from_json(record, "sources"),
        batch=batch,
        plan=plan_from_json(record),
        build=build,
    )


def engines_from_json(
    bundle: Path, records: list[Any], config: ModelConfig
) -> tuple[tuple[EngineRecord, ...], tuple[DamagedEngine, ...]]:
    """Read all records of engines; one that is damaged spoils no other."""
    engines: dict[tuple[str, str, str], EngineRecord] = {}
    damaged = []
    for index, record in enumerate(records):
        try:
            engine = engine_from_json(bundle, record, config)
            if engine.key in engines:
                raise ValueError("a second engine for one backend, device and precision")
            engines[engine.key] = engine
        except (AttributeError, KeyError, TypeError, ValueError, BundleError) as error:
            reason = str(error) if isinstance(error, BundleError) else f"{type(error).__name__}: {error}"
            name = record["directory"] if isinstance(record, dict) and "directory" in record else f"number {index}"
            damaged.append(DamagedEngine(name=str(name), key=key_of_record(record), reason=reason))
    return tuple(engines.values()), tuple(damaged)


def key_of_record(record: Any) -> tuple[str, str, str] | None:
    """Return backend, device and precision of a record that may be damaged; None where it does not state them."""
    values = [record.get(name) if isinstance(record, dict) else None for name in ("backend", "device", "precision")]
    backend, device, precision = (value if isinstance(value, str) else "" for value in values)
    return (backend, device, precision) if backend and device and precision else None


def _numbers_in(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _graph_from_json(directory: Path, record: Mapping[str, Any], files: Mapping[str, str]) -> GraphRecord:
    name, sha256 = typed(record, "file", str), typed(record, "sha256", str)
    if files.get(name) != sha256:
        raise ValueError(f"the graph {name} is none of the engine's files")
    inputs, outputs = specs_from_json(record, "inputs"), specs_from_json(record, "outputs")
    return GraphRecord(path=directory / name, sha256=sha256, inputs=inputs, outputs=outputs)


def _check_borders(found: Mapping[str, Border], config: ModelConfig, batch: int | None) -> None:
    """Raise `ValueError` unless there are the graphs that a session needs, with inputs and outputs that fit."""
    (target, current, latent), encoded = graph_specs(config)["encoder"]
    expected = {**graph_specs(config), "preview": ((latent,), (current,))}
    if "target" in found:
        shapes = [spec.shape[1:] for spec in found["target"][1]]  # one, of any size: [C, h, w]
        if [len(shape) for shape in shapes] != [3] or not all(isinstance(size, int) and size > 0 for size in shapes[0]):
            raise ValueError(f"an engine's target gives {shapes}, expected {TARGET_FEATURES} [C, h, w]")
        features = replace(target, name=TARGET_FEATURES, shape=(BATCH, *shapes[0]))
        expected |= {"target": ((target,), (features,)), "encoder": ((features, current, latent), encoded)}
    if not set(graph_specs(config)) <= set(found) <= set(expected):
        raise ValueError(f"an engine has the graphs {', '.join(found) or 'none'}, expected {', '.join(expected)}")
    for role, border in found.items():
        for specs, fitting in zip(border, expected[role], strict=True):
            sized = {replace(spec, shape=(BATCH if batch is None else batch, *spec.shape[1:])) for spec in fitting}
            if len(specs) != len(sized) or set(specs) != sized:
                raise ValueError(f"the inputs or outputs of an engine's {role} do not fit the model")
