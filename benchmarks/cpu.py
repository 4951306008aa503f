"""Compare ways to run the same model on this machine's CPU: the published table.

    python -m benchmarks.cpu --golden DIRECTORY --work DIRECTORY

Contenders take turns call by call, each in a process of its own; figures are ratios to upstream's arithmetic on torch
in the same round. Writes cpu.json, cpu.md and cpu.png. Without the golden directory, only the demo model is measured.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import click

from benchmarks.cells import CellSettings, Row, measure_cell
from benchmarks.contenders import BASELINE, CONTENDERS, REFERENCE, Contender, ModelFiles
from benchmarks.loop_overhead import measure_loop_overhead
from benchmarks.memory import memory_of_graphs
from benchmarks.models import DEMO, MODELS, build_engines, load_inputs, prepare_model
from benchmarks.tables import Cell, SpeedTable, format_markdown, read_table, write_table
from restyle_deploy.bench.environment import describe_environment
from restyle_deploy.bundle import read_bundle
from restyle_deploy.processor import usable_cores

RESULTS = Path("benchmarks/results")
# Whose versions the figures depend on.
TIMED_PACKAGES = ("restyle-deploy", "numpy", "onnxruntime", "openvino", "torch")
FEWEST_ROUNDS = 3
LOOP_ROUNDS = 50
BYTES_PER_MIB = 2**20
BYTES_PER_GIB = 2**30


def parse_names(known: tuple[str, ...]) -> click.ParamType[tuple[str, ...]]:
    """Return a parameter type: names of a list, separated by commas."""

    def names(value: str) -> tuple[str, ...]:
        chosen = tuple(value.split(","))
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise click.BadParameter(f"{', '.join(unknown)}: expected some of {','.join(known)}")
        return chosen

    return click.types.FuncParamType(names)


def parse_batches(value: str) -> tuple[int, ...]:
    """Return batch sizes from a list such as 1,4."""
    try:
        batches = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of whole numbers such as 1,4") from None
    if min(batches) < 1:
        raise click.BadParameter(f"{value!r}: each batch is at least 1")
    return batches


@click.command(help=__doc__)
@click.option("--golden", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Holds weights.py.")
@click.option("--work", default="out/cpu", show_default=True, type=click.Path(path_type=Path), help="Keeps bundles.")
@click.option("-o", "--output", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="Results.")
@click.option("--models", default=",".join(MODELS), show_default=True, type=parse_names(MODELS))
@click.option("--batches", default="1,4", show_default=True, type=parse_batches)
@click.option("--contenders", default=",".join(CONTENDERS), show_default=True, type=parse_names(tuple(CONTENDERS)))
@click.option("--steps", default=5, show_default=True, type=click.IntRange(min=1), help="Refinement steps of a call.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Measured calls of each.")
@click.option("--seconds", default=240.0, show_default=True, help=f"After so long, only {FEWEST_ROUNDS} rounds.")
@click.option("--threads", type=click.IntRange(min=1), show_default="the cores", help="Threads of each contender.")
@click.option("--memory", default=24.0, show_default=True, help="GiB of all processes together.")
@click.option(
    "--resume", is_flag=True, help="Go on with the results of this processor, these versions, steps and threads."
)
@click.option("--build/--no-build", default=True, show_default=True, help="Build and tune the engines that lack.")
def main(
    golden: Path | None,
    work: Path,
    output: Path,
    models: tuple[str, ...],
    batches: tuple[int, ...],
    contenders: tuple[str, ...],
    steps: int,
    rounds: int,
    seconds: float,
    threads: int | None,
    memory: float,
    resume: bool,
    build: bool,
) -> None:
    """Measure cell by cell; the files are written anew after each, so that an interrupted run leaves what it has."""
    if golden is None:
        models = tuple(name for name in models if name == DEMO)
        click.echo("no --golden directory: only the demo model is measured", err=True)
    if not models:
        raise click.UsageError("nothing to measure without the golden directory; name it: --golden DIRECTORY")
    chosen = [row for row in CONTENDERS.values() if row.name in {BASELINE, REFERENCE, *contenders}]
    settings = CellSettings(
        steps=steps,
        threads=threads or usable_cores(),
        rounds=rounds,
        fewest_rounds=min(rounds, FEWEST_ROUNDS),
        seconds=seconds,
        memory_mib=min(memory * BYTES_PER_GIB, 0.9 * _physical_bytes()) / BYTES_PER_MIB,
    )
    table = SpeedTable(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=describe_environment(),
        settings=settings,
        cells=(),
        loop_overhead=None,
    )
    former = read_table(output) if resume else None
    if former is not None:
        different = _different_conditions(former, table)
        if different:
            raise click.UsageError(f"{output} cannot be resumed: other {', '.join(different)}; leave out --resume")
        table = replace(table, cells=former.cells, loop_overhead=former.loop_overhead)
    work.mkdir(parents=True, exist_ok=True)
    for name in models:
        lacking = [
            batch for batch in batches if (name, batch) not in {(cell.model, cell.batch) for cell in table.cells}
        ]
        if not lacking:
            continue
        files = prepare_model(name, golden, work, _show)
        refused = build_engines(files, chosen, settings.threads, _show) if build else {}
        for batch in lacking:
            cell = _measure(files, golden, batch, [row for row in chosen if row.name not in refused], settings)
            cell = replace(cell, rows=_with_refused(cell.rows, refused))
            cells = sorted((*table.cells, cell), key=lambda cell: (MODELS.index(cell.model), cell.batch))
            table = replace(table, cells=tuple(cells))
            write_table(table, output)
        if name == DEMO:
            _show(f"{name}: the loop's own time")
            images = load_inputs(name, golden, read_bundle(files.bundle).config.input_shape, 1)
            overhead = measure_loop_overhead(
                files.bundle, images, steps=steps, rounds=LOOP_ROUNDS, threads=settings.threads
            )
            table = replace(table, loop_overhead=overhead)
    written = write_table(table, output)
    click.echo(format_markdown(table))
    _show(f"written: {', '.join(map(str, written))}")


def _measure(
    files: ModelFiles, golden: Path | None, batch: int, chosen: list[Contender], settings: CellSettings
) -> Cell:
    """Measure one model at one batch."""
    bundle = read_bundle(files.bundle)
    memory = memory_of_graphs(*(record.path for record in bundle.graphs.values()))
    rows = measure_cell(
        files,
        load_inputs(files.name, golden, bundle.config.input_shape, batch),
        chosen,
        settings,
        progress=lambda text: _show(f"{files.name}, batch {batch}: {text}"),
    )
    return Cell(
        model=files.name,
        output_size=bundle.config.output_size,
        batch=batch,
        weight_mib=memory.weight_bytes / BYTES_PER_MIB,
        activation_mib=memory.activation_bytes / BYTES_PER_MIB,
        rows=rows,
    )


def _with_refused(rows: tuple[Row, ...], refused: Mapping[str, str]) -> tuple[Row, ...]:
    """Add a row that says why for each contender whose engine cannot be built here."""
    by_name = {row.contender: row for row in rows}
    for name, reason in refused.items():
        contender = CONTENDERS[name]
        by_name[name] = Row(
            contender=name, label=contender.label, is_approximate=contender.is_approximate, reason=reason
        )
    return tuple(by_name[name] for name in CONTENDERS if name in by_name)


def _different_conditions(former: SpeedTable, table: SpeedTable) -> list[str]:
    """Return why figures of a former run may not stand beside new ones; their commit and rounds may differ."""
    ours, theirs = (
        {
            "processor": each.environment.cpu,
            "steps": each.settings.steps,
            "threads": each.settings.threads,
            **{f"version of {name}": each.environment.packages.get(name) for name in TIMED_PACKAGES},
        }
        for each in (table, former)
    )
    return [name for name, value in ours.items() if value != theirs[name]]


def _show(text: str) -> None:
    click.echo(f"{datetime.now():%H:%M:%S} {text}", err=True)


def _physical_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


if __name__ == "__main__":
    main()
