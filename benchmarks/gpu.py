"""Compare ways to run the same model on this machine's GPU, and say which goals are reached.

    python -m benchmarks.gpu --golden DIRECTORY --work DIRECTORY

Contenders take turns, each in a process of its own, on the same weights and inputs. Writes report.json, report.md and
chart.png under benchmarks/results/<device>/, anew after each model and batch. Without the golden directory, only the
demo model is measured. `--device cpu` is a dry run: it shows that the script works, and nothing about a GPU.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path

import click

from benchmarks.contenders import ModelFiles
from benchmarks.cpu import parse_batches, parse_names
from benchmarks.gpu_cells import GpuSettings, measure_gpu_cell, row_without_figures
from benchmarks.gpu_contenders import BASELINE, GPU_CONTENDERS, GpuContender
from benchmarks.gpu_floor import DeviceRates, floor_of, measure_rates
from benchmarks.gpu_table import GpuCell, GpuRow, GpuTable, format_gpu_table, verdicts_of, write_gpu_table
from benchmarks.kernels import describe_device
from benchmarks.models import DEMO, MODELS, build_engines, load_inputs, prepare_model
from benchmarks.operators import layers_of
from benchmarks.verdicts import format_verdict
from restyle_deploy.bench.environment import describe_environment
from restyle_deploy.bundle import read_bundle
from restyle_deploy.ops.torch_gpu import why_torch_sees_no_gpu
from restyle_deploy.processor import describe_processor

RESULTS = Path("benchmarks/results")
DRY_RUN = "dry run on the CPU"
ENDURED_CALLS, ENDURED_CALLS_OF_DRY_RUN = 10_000, 20


@click.command(help=__doc__)
@click.option("--golden", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Holds weights.py.")
@click.option("--work", default="out/gpu", show_default=True, type=click.Path(path_type=Path), help="Keeps bundles.")
@click.option("-o", "--output", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="Results.")
@click.option(
    "--device", default="cuda:0", show_default=True, type=click.Choice(("cuda:0", "cpu")), help="cpu: dry run."
)
@click.option("--models", default="256,512,1024", show_default=True, type=parse_names(MODELS))
@click.option("--batches", default="1,8", show_default=True, type=parse_batches)
@click.option(
    "--contenders", default=",".join(GPU_CONTENDERS), show_default=True, type=parse_names(tuple(GPU_CONTENDERS))
)
@click.option("--steps", default=5, show_default=True, type=click.IntRange(min=1), help="Refinement steps of a call.")
@click.option("--rounds", default=6, show_default=True, type=click.IntRange(min=1), help="Turns of each contender.")
@click.option("--calls", default=10, show_default=True, type=click.IntRange(min=1), help="Measured calls of a turn.")
@click.option(
    "--endured-calls",
    type=click.IntRange(min=0),
    show_default=f"{ENDURED_CALLS}, of a dry run {ENDURED_CALLS_OF_DRY_RUN}",
    help="Calls of the fastest of ours, whose memory is watched.",
)
@click.option("--build/--no-build", default=True, show_default=True, help="Build the engines that lack.")
@click.option("--tune", is_flag=True, help="Measure the choices of engines that are built.")
def main(
    golden: Path | None,
    work: Path,
    output: Path,
    device: str,
    models: tuple[str, ...],
    batches: tuple[int, ...],
    contenders: tuple[str, ...],
    steps: int,
    rounds: int,
    calls: int,
    endured_calls: int | None,
    build: bool,
    tune: bool,
) -> None:
    """Measure cell by cell, and say which goals are reached."""
    is_dry = device == "cpu"
    if not is_dry and (reason := why_torch_sees_no_gpu()):
        raise click.ClickException(f"{reason}: nothing was measured; a dry run is: --device cpu")
    if golden is None:
        models = (DEMO,)
        click.echo("no --golden directory: only the demo model is measured", err=True)
    if endured_calls is None:
        endured_calls = ENDURED_CALLS_OF_DRY_RUN if is_dry else ENDURED_CALLS
    settings = GpuSettings(device=device, steps=steps, rounds=rounds, calls=calls, endured_calls=endured_calls)
    table = _new_table(settings)
    chosen = [row for row in GPU_CONTENDERS.values() if row.name in {BASELINE, *contenders}]
    work.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name in models:
        files = prepare_model(name, golden, work, _show)
        refused = _refused_here(chosen, device)
        able = [row for row in chosen if row.name not in refused]
        if build:
            refused |= build_engines(files, able, None, _show, device=device, tune=tune)
        for batch in batches:
            cell = _measure(
                files, golden, batch, [row for row in able if row.name not in refused], settings, table.rates
            )
            table = replace(table, cells=(*table.cells, replace(cell, rows=_with_refused(cell.rows, refused))))
            written = write_gpu_table(table, output)
    click.echo(format_gpu_table(table))
    verdicts = verdicts_of(table.cells)
    for verdict in verdicts:
        click.echo(format_verdict(verdict), err=True)
    reached = sum(verdict.is_reached for verdict in verdicts)
    _show(f"{reached} of {len(verdicts)} goals reached; written: {', '.join(map(str, written))}")


def _new_table(settings: GpuSettings) -> GpuTable:
    """Look at the machine, and measure what its device reaches."""
    is_dry = settings.device == "cpu"
    _show("rates of the device")
    return GpuTable(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=describe_environment(),
        device={"GPU": DRY_RUN, "processor": describe_processor()} if is_dry else describe_device(),
        rates=measure_rates(settings.device),
        settings=asdict(settings),
        cells=(),
    )


def _measure(
    files: ModelFiles,
    golden: Path | None,
    batch: int,
    chosen: list[GpuContender],
    settings: GpuSettings,
    rates: DeviceRates,
) -> GpuCell:
    """Measure one model at one batch."""
    bundle = read_bundle(files.bundle)
    layers = [layer for graph in bundle.graphs.values() for layer in layers_of(graph.path)]
    rows = measure_gpu_cell(
        files,
        load_inputs(files.name, golden, bundle.config.input_shape, batch),
        chosen,
        settings,
        progress=lambda text: _show(f"{files.name}, batch {batch}: {text}"),
    )
    return GpuCell(
        model=files.name,
        output_size=bundle.config.output_size,
        batch=batch,
        floor=floor_of(layers, rates, batch=batch, steps=settings.steps),
        rows=rows,
    )


def _refused_here(chosen: list[GpuContender], device: str) -> dict[str, str]:
    """Return, by name, why contenders cannot run on this kind of device."""
    kind = device.partition(":")[0]
    return {row.name: f"it does not run on {kind}" for row in chosen if kind not in row.devices}


def _with_refused(rows: tuple[GpuRow, ...], refused: Mapping[str, str]) -> tuple[GpuRow, ...]:
    """Add a row that says why for each contender that could not take part."""
    by_name = {row.contender: row for row in rows}
    by_name |= {name: row_without_figures(GPU_CONTENDERS[name], reason) for name, reason in refused.items()}
    return tuple(by_name[name] for name in GPU_CONTENDERS if name in by_name)


def _show(text: str) -> None:
    click.echo(f"{datetime.now():%H:%M:%S} {text}", err=True)


if __name__ == "__main__":
    main()
