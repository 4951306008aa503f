"""The command `restyle-deploy build`."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import click

from restyle_deploy.backends import BACKENDS
from restyle_deploy.backends.base import EXACT_PRECISION, PRECISIONS, EngineOptions
from restyle_deploy.cli.options import PRECISION_HELP, bundle_argument, device_option, engine_options, json_option
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.facts import format_facts


@click.command()
@bundle_argument
@click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    required=True,
    is_eager=True,
    help="Library that will run the engine.",
)
@device_option("Device that the engine is for.")
@click.option(
    "--precision", type=click.Choice(list(PRECISIONS)), default=EXACT_PRECISION, show_default=True, help=PRECISION_HELP
)
@click.option(
    "--threads", type=click.IntRange(min=1), show_default="the backend's choice", help="CPU threads; not for GPUs."
)
@click.option("--tune", is_flag=True, help="Measure the ways to compute each layer here; else a stored table decides.")
@click.option("--retune", is_flag=True, help="Tune without the times that a former build has measured.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=180.0,
    show_default=True,
    help="Time for --tune and --retune to measure the layers; each of the two graphs has half. Comparing whole graphs "
    "comes on top.",
)
@engine_options
@click.option("--dry-run", is_flag=True, help="Tell what would be built; the bundle is not changed.")
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
    dry_run: bool,
    as_json: bool,
    **engine: Any,
) -> None:
    """Build an engine from BUNDLE's graphs, and add it to the bundle.

    The graphs are rewritten without changing their function, prepared by the backend, and verified against the
    reference model's results where the engine can run here. `invert` and `bench` use the engine from then on. Needs the
    extra: pip install 'restyle-deploy[build]'.

    TensorRT keeps its timing cache in BUNDLE/engines/timing-<library>-<version>-<GPU>.cache, and --tune what it
    measures in BUNDLE/engines/tuning.json; later builds begin with both, and both may be removed.

    \b
    On GPUs:
      restyle-deploy build faces --backend tensorrt --precision fp16 --max-batch 16 --workspace 4G
      restyle-deploy build faces --backend tensorrt --precision fp16 --stripped --hardware-compatible
      restyle-deploy build faces --backend tensorrt --version-compatible --optimization-level 5
      restyle-deploy build faces --backend tensorrt-rtx --compute-capability 8.9 --compute-capability 12.0
      restyle-deploy build faces --backend tensorrt-rtx --precision fp16 --dry-run

    Example: restyle-deploy build faces --backend onnxruntime --tune
    """
    _require_libraries()
    from restyle_deploy.build import BuildOptions, build_engine, describe_build

    options = BuildOptions(
        backend=backend,
        device=device,
        precision=precision,
        threads=threads,
        tune=tune or retune,
        retune=retune,
        seconds=seconds,
        engine=EngineOptions(**engine),
    )
    try:
        if dry_run:
            facts = describe_build(bundle, options, progress=_tell)
            click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(format_facts(facts)))
            return
        record = build_engine(bundle, options, progress=_tell)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        from restyle_deploy.engines import engine_as_json

        click.echo(json.dumps(engine_as_json(record, bundle), indent=2))
        return
    from restyle_deploy.engines import quote_path

    size = sum((record.directory / name).stat().st_size for name in record.files)
    is_verified = record.build["verified"]
    state = "built and verified" if is_verified else "built, NOT VERIFIED"
    profile = record.build.get("profile")
    batches = "" if profile is None else ", batches {min} to {max}, fastest for {opt}".format(**profile)
    plan = f"plan: restyle-deploy inspect {quote_path(bundle)}"
    click.echo(f"{record.directory}: {state}, {size / 1e6:.1f} MB{batches}; {plan}")
    if not is_verified:
        click.echo(f"not verified: {record.build['reason']}")


def _tell(stage: str) -> None:
    click.echo(f"{stage} …", err=True)


def _require_libraries() -> None:
    missing = [name for name in ("onnx", "onnx_ir", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise BackendUnavailableError(
            f"build needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            "run: pip install 'restyle-deploy[build]'"
        )
