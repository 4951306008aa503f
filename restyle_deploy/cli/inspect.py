"""The command `restyle-deploy inspect`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from restyle_deploy.cli.options import bundle_argument, json_option

if TYPE_CHECKING:
    from restyle_deploy.bundle import Bundle, EngineRecord
    from restyle_deploy.tensors import TensorSpec


@click.command()
@bundle_argument
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Tell what BUNDLE holds: model, graphs, engines with their plans, and verification.

    Example: restyle-deploy inspect engines/demo-faces
    """
    from restyle_deploy.bundle import open_bundle

    opened = open_bundle(bundle)
    click.echo(json.dumps(_facts_of_bundle(opened), indent=2) if as_json else "\n".join(_describe_bundle(opened)))


def _facts_of_bundle(bundle: "Bundle") -> dict[str, Any]:
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
        "verification": dict(bundle.verification),
    }


def _describe_bundle(bundle: "Bundle") -> list[str]:
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
        "engines": {engine.directory.name: _describe_engine(engine) for engine in bundle.engines} or [],
        "verification": bundle.verification,
    }
    return _lines(facts)


def _describe_engine(engine: "EngineRecord") -> dict[str, Any]:
    plan = engine.plan
    return {
        "backend": engine.backend,
        "device": engine.device,
        "precision": engine.precision,
        "batch": "any" if engine.batch is None else engine.batch,
        "libraries": [f"{name} {version}" for name, version in engine.library_versions.items()],
        "processor": engine.processor,
        "graphs": list(engine.graphs),
        "plan": f"{plan['origin']}, measured for {plan['seconds']:.1f} s" if plan["seconds"] else plan["origin"],
        **({"whole graphs": wholes} if (wholes := _describe_wholes(plan["measurements"])) else {}),
        "sites": _describe_sites(plan["choices"], plan["measurements"]),
    }


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


def _lines(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    lines, width = [], max([24 - len(indent), *(len(name) + 2 for name in facts)])
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"{indent}{name + ':':<{width}}{text or 'none'}")
    return lines
