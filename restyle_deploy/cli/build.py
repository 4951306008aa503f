"""The command `restyle-deploy build`."""

import importlib.util
import json
from pathlib import Path

import click

from restyle_deploy.backends import BACKENDS
from restyle_deploy.backends.base import EXACT_PRECISION, PRECISIONS
from restyle_deploy.cli.options import bundle_argument, json_option
from restyle_deploy.errors import BackendUnavailableError


@click.command()
@bundle_argument
@click.option("--backend", type=click.Choice(list(BACKENDS)), required=True, help="Library that will run the engine.")
@click.option("--device", default="cpu", show_default=True, help="Device that the engine is for.")
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default=EXACT_PRECISION,
    show_default=True,
    help="Precision that the engine computes in; bf16 is approximate.",
)
@click.option("--threads", type=click.IntRange(min=1), show_default="the backend's choice", help="CPU threads.")
@click.option("--tune", is_flag=True, help="Measure the ways to compute each layer here; else a stored table decides.")
@click.option("--retune", is_flag=True, help="Tune without the times that a former build has measured.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=180.0,
    show_default=True,
    help="Time for measuring the layers; each of the two graphs has half. Comparing whole graphs comes on top.",
)
@json_option
def build(
    bundle: Path,
    backend: str,
    device: str,
    precision: str,
    threads: int | None,
    tune: bool,
    retune: bool,
    seconds: float,
    as_json: bool,
) -> None:
    """Build an engine from BUNDLE's graphs for this machine, and add it to the bundle.

    The graphs are rewritten without changing their function, prepared by the backend, and verified against the
    reference model's results. `invert` and `bench` use the engine from then on. Needs the extra: pip install
    'restyle-deploy[build]'.

    Example: restyle-deploy build faces --backend onnxruntime --tune
    """
    _require_libraries()
    from restyle_deploy.build import BuildOptions, build_engine

    options = BuildOptions(
        backend=backend,
        device=device,
        precision=precision,
        threads=threads,
        tune=tune or retune,
        retune=retune,
        seconds=seconds,
    )
    record = build_engine(bundle, options, progress=lambda stage: click.echo(f"{stage} …", err=True))
    if as_json:
        from restyle_deploy.engines import engine_as_json

        click.echo(json.dumps(engine_as_json(record, bundle), indent=2))
        return
    size = sum((record.directory / name).stat().st_size for name in record.files)
    click.echo(f"{record.directory}: built and verified, {size / 1e6:.1f} MB; plan: restyle-deploy inspect {bundle}")


def _require_libraries() -> None:
    missing = [name for name in ("onnx", "onnx_ir", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise BackendUnavailableError(
            f"build needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            "run: pip install 'restyle-deploy[build]'"
        )
