"""The command `restyle-deploy inspect`."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from restyle_deploy.cli.options import bundle_argument, json_option
from restyle_deploy.facts import format_facts

if TYPE_CHECKING:
    from restyle_deploy.bundle import Bundle, EngineRecord
    from restyle_deploy.tensors import TensorSpec

Changes = Mapping[str, list[str]]
"""Names of an engine's files that are `missing`, and that have `changed` since it was built."""

_WIDTHS = (60, 18, 8, 0, 16, 0)
_LAYER_SOURCES = {
    "engine": "as the engine runs them",
    "network": "as parsed: the library did not tell how the engine fuses them, and in what formats",
}


@click.command()
@bundle_argument
@click.option(
    "--layers", "with_layers", is_flag=True, help="List the layers of engines instead, with precisions and formats."
)
@json_option
def inspect(bundle: Path, with_layers: bool, as_json: bool) -> None:
    """Tell what BUNDLE holds: model, graphs, engines with their plans, and verification.

    All files are hashed, which takes a while where they are large. A graph that has changed is an error; of an engine
    it is told which files are missing or have changed since it was built.

    With --layers it lists what the engines compute instead, as in: restyle-deploy inspect faces --layers

    Example: restyle-deploy inspect engines/demo-faces
    """
    from restyle_deploy.bundle import open_bundle

    opened = open_bundle(bundle)
    files = {engine.directory.name: find_file_changes(engine) for engine in opened.engines}
    if with_layers:
        layers = {
            engine.directory.name: read_layers(engine, without=files[engine.directory.name]["missing"])
            for engine in opened.engines
        }
        facts = {name: {**layers[name], "files": files[name]} for name in layers}
        click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_describe_layers(layers, files)))
        return
    lines = [json.dumps(_facts_of_bundle(opened, files), indent=2)] if as_json else _describe_bundle(opened, files)
    click.echo("\n".join(lines))


def _facts_of_bundle(bundle: "Bundle", files: Mapping[str, Changes]) -> dict[str, Any]:
    """Return everything as plain values, for machines."""
    from restyle_deploy.bundle import FORMAT_VERSION
    from restyle_deploy.engines import engine_as_json

    return {
        "bundle": str(bundle.path),
        "format_version": FORMAT_VERSION,
        "model": asdict(bundle.config),
        "checkpoint_sha256": bundle.checkpoint_sha256,
        "graphs": {
            name: {
                "file": graph.path.name,
                "bytes": graph.path.stat().st_size,
                "sha256": graph.sha256,
                "inputs": [asdict(spec) for spec in graph.inputs],
                "outputs": [asdict(spec) for spec in graph.outputs],
            }
            for name, graph in bundle.graphs.items()
        },
        "engines": [engine_as_json(engine, bundle.path) for engine in bundle.engines],
        "engine_files": dict(files),
        "damaged_engines": [asdict(damaged) for damaged in bundle.damaged_engines],
        "verification": dict(bundle.verification),
    }


def _describe_bundle(bundle: "Bundle", files: Mapping[str, Changes]) -> list[str]:
    """Return lines for people."""
    config = bundle.config
    facts: dict[str, Any] = {
        "bundle": bundle.path,
        "encoder type": config.encoder_type,
        "domain": config.domain,
        "image": f"{config.image_shape[1]}×{config.image_shape[0]} px",
        "encoder input": f"{config.input_shape[1]}×{config.input_shape[0]} px",
        "styles": f"{config.n_styles} × {config.style_dim}",
        "checkpoint sha256": bundle.checkpoint_sha256,
        "graphs": {
            name: {
                "file": f"{graph.path.name}, {graph.path.stat().st_size / 1e6:.1f} MB",
                "sha256": graph.sha256,
                "inputs": [_format_spec(spec) for spec in graph.inputs],
                "outputs": [_format_spec(spec) for spec in graph.outputs],
            }
            for name, graph in bundle.graphs.items()
        },
        "engines": {
            engine.directory.name: _describe_engine(engine, files[engine.directory.name]) for engine in bundle.engines
        }
        or [],
        **({"damaged engines": damaged} if (damaged := _describe_damaged(bundle)) else {}),
        "verification": bundle.verification,
    }
    return format_facts(facts)


def _describe_engine(engine: "EngineRecord", changes: Changes) -> dict[str, Any]:
    plan = engine.plan
    return {
        "backend": engine.backend,
        "device": engine.device,
        "precision": engine.precision,
        "batch": "any" if engine.batch is None else engine.batch,
        "libraries": [f"{name} {version}" for name, version in engine.library_versions.items()],
        "processor": engine.processor,
        "graphs": list(engine.graphs),
        "files": _describe_changes(changes) or _describe_sound_files(engine),
        **_describe_build(engine.build),
        "plan": f"{plan['origin']}, measured for {plan['seconds']:.1f} s" if plan["seconds"] else plan["origin"],
        **({"whole graphs": wholes} if (wholes := _describe_wholes(plan["measurements"])) else {}),
        "sites": _describe_sites(plan["choices"], plan["measurements"]),
    }


def _describe_build(build: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether an engine was verified, and how its backend built it; nothing for a verified one on a CPU."""
    facts = {name: value for name, value in build.items() if name not in ("verified", "reason", "graphs")}
    state = "yes" if build["verified"] else f"NO: {build['reason']}"
    return {"verified": state, **({"build": facts} if facts else {})}


def _describe_damaged(bundle: "Bundle") -> dict[str, str]:
    mend = "build it again, or leave it: the others can be used"
    return {damaged.name: f"{damaged.reason}; {mend}" for damaged in bundle.damaged_engines}


def find_file_changes(engine: "EngineRecord") -> Changes:
    """Hash an engine's files and return the names of those that are `missing`, and that have `changed`."""
    from restyle_deploy.manifest import find_changes

    changes = find_changes(engine.files_of(engine.graphs))
    names = {path.relative_to(engine.directory).as_posix(): sha256 for path, sha256 in changes.items()}
    return {
        "missing": [name for name, sha256 in names.items() if sha256 is None],
        "changed": [name for name, sha256 in names.items() if sha256 is not None],
    }


def _describe_changes(changes: Changes) -> str:
    """Return what is wrong with an engine's files; empty where they are as they were built."""
    texts = [f"{kind.upper()} {', '.join(names)}" for kind, names in changes.items() if names]
    return "; ".join([*texts, "build it again"]) if texts else ""


def _describe_sound_files(engine: "EngineRecord") -> str:
    size = sum((engine.directory / name).stat().st_size for name in engine.files)
    return f"{len(engine.files)}, {size / 1e6:.1f} MB, hashed: unchanged since the build"


def read_layers(engine: "EngineRecord", *, without: Collection[str] = ()) -> dict[str, Any]:
    """Return what lies beside an engine's graphs about their layers, by role; nothing where the backend tells none.

    Args:
        engine: of a bundle.
        without: names of files that are not read.
    Raises:
        BundleError: a file cannot be read, or holds no layers.
    """
    from restyle_deploy.engines import LAYERS_SUFFIX
    from restyle_deploy.errors import BundleError
    from restyle_deploy.manifest import read_json

    layers = {}
    for role, graph in engine.graphs.items():
        path = graph.path.with_suffix(LAYERS_SUFFIX)
        if path.name in engine.files and path.name not in without:
            try:
                layers[role] = read_json(path)
                _check_layers(layers[role])
            except (KeyError, OSError, TypeError, ValueError) as error:
                raise BundleError(
                    f"{path}: holds no layers ({type(error).__name__}: {error}); build the engine again"
                ) from error
    return layers


def _check_layers(content: Any) -> None:
    """Raise `KeyError`, `TypeError` or `ValueError` unless a backend writes such content about a graph's layers."""
    from restyle_deploy.manifest import typed

    if not isinstance(content, dict):
        raise TypeError(f"a {type(content).__name__}, expected an object")
    if typed(content, "of", str) not in _LAYER_SOURCES:
        raise ValueError(f"of is {content['of']!r}, expected one of {', '.join(_LAYER_SOURCES)}")
    for layer in typed(content, "layers", list):
        for key in ("name", "type", "precision"):
            typed(layer, key, str)
        if layer["format"] is not None:
            typed(layer, "format", str)
        for key, kind in (("shapes", list), ("model_layers", str)):
            if not all(isinstance(value, kind) for value in typed(layer, key, list)):
                raise TypeError(f"{key} is {layer[key]!r}, expected a list of {kind.__name__}")


def _describe_layers(engines: Mapping[str, Mapping[str, Any]], files: Mapping[str, Changes]) -> list[str]:
    """Return lines: a heading for each graph, and name, type, precision, format, shapes and model layers of each."""
    lines = []
    for engine, graphs in engines.items():
        changes = _describe_changes(files[engine])
        if changes:
            lines.append(f"{engine}: files: {changes}; layers are told as they were when it was built")
        elif not graphs:
            lines.append(f"{engine}: its backend tells no layers")
        for role, content in graphs.items():
            count = len(content["layers"])
            lines.append(
                f"{engine} {role}, {count} {'layer' if count == 1 else 'layers'}, {_LAYER_SOURCES[content['of']]}"
            )
            lines += [_format_layer(layer) for layer in content["layers"]]
    return lines or ["no engine"]


def _format_layer(layer: Mapping[str, Any]) -> str:
    shapes = " ".join("×".join(map(str, shape)) for shape in layer["shapes"])
    # A fused layer's own name does not say what it computes.
    model_layers = [] if layer["name"].startswith(tuple(layer["model_layers"])) else layer["model_layers"]
    columns = [layer["name"], layer["type"], layer["precision"], layer["format"] or "", shapes, ", ".join(model_layers)]
    return "  " + "  ".join(f"{column:<{width}}" for column, width in zip(columns, _WIDTHS, strict=True)).rstrip()


def _describe_wholes(measurements: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a text per graph that was timed as exported and as planned."""
    return [
        f"{name} {', '.join(f'{way} {time:.2f}' for way, time in times.items())} ms"
        for name, times in measurements.items()
        if name.startswith("whole ")
    ]


def _describe_sites(choices: Mapping[str, str], measurements: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Return a text per site: the choice and, where they were measured, all candidates, the fastest with a star."""
    width = max(map(len, choices.values()), default=0)
    sites = {}
    for site, choice in choices.items():
        times = measurements.get(site, {})
        fastest = min(times.values(), default=None)
        candidates = [f"{name} {time:.2f}{'*' if time == fastest else ''}" for name, time in times.items()]
        sites[site] = f"{choice:<{width}}  {', '.join(candidates)} ms" if candidates else choice
    return sites


def _format_spec(spec: "TensorSpec") -> str:
    return f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]"
