"""The command `restyle-deploy inspect`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from restyle_deploy.cli.options import bundle_argument, json_option

if TYPE_CHECKING:
    from restyle_deploy.bundle import Bundle, GraphRecord
    from restyle_deploy.tensors import TensorSpec


@click.command()
@bundle_argument
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Tell what BUNDLE holds: model, graphs, engines and verification.

    Example: restyle-deploy inspect engines/demo-faces
    """
    from restyle_deploy.bundle import open_bundle

    facts = _facts_of_bundle(open_bundle(bundle))
    click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))


def _facts_of_bundle(bundle: "Bundle") -> dict[str, Any]:
    config = bundle.config
    return {
        "bundle": str(bundle.path),
        "encoder type": config.encoder_type,
        "domain": config.domain,
        "image": f"{config.image_shape[1]}×{config.image_shape[0]} px",
        "encoder input": f"{config.input_shape[1]}×{config.input_shape[0]} px",
        "styles": f"{config.n_styles} × {config.style_dim}",
        "checkpoint sha256": bundle.checkpoint_sha256,
        "graphs": {name: _facts_of_graph(graph) for name, graph in bundle.graphs.items()},
        "engines": [dict(engine) for engine in bundle.engines],
        "verification": dict(bundle.verification),
    }


def _facts_of_graph(graph: "GraphRecord") -> dict[str, Any]:
    return {
        "file": graph.path.name,
        "megabytes": round(graph.path.stat().st_size / 1e6, 1),
        "sha256": graph.sha256,
        "inputs": [_format_spec(spec) for spec in graph.inputs],
        "outputs": [_format_spec(spec) for spec in graph.outputs],
    }


def _format_spec(spec: "TensorSpec") -> str:
    return f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]"


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"{indent}{name + ':':<{24 - len(indent)}}{text or 'none'}")
    return lines
