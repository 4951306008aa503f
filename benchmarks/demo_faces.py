"""Measure the shipped demo model on the portraits that were held out of its training, with every backend of the CPU,
its engines and its precisions.

    python -m benchmarks.demo_faces ARCHIVE

Writes benchmarks/results/demo-faces.json (a report as `restyle-deploy bench` writes it) and its chart. No portrait and
no rendered image is kept. A run that is interrupted goes on where it was: its finished parts are in --work.
"""

import shutil
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import CONTENDERS, ModelFiles
from benchmarks.models import build_engines
from examples.demo_model.portraits import load_portraits, reduce_to_64
from restyle_deploy.backends import BACKENDS, load_backend
from restyle_deploy.backends.base import EXACT_PRECISION, PRECISIONS, RunnerOptions
from restyle_deploy.bench.charts import CHART_NAME
from restyle_deploy.bench.matrix import MatrixOptions, configurations_of
from restyle_deploy.bench.report import Configuration, Report
from restyle_deploy.bench.run import REPORT_NAME, run_bench
from restyle_deploy.bench.schedule import BenchOptions
from restyle_deploy.bench.tables import format_table
from restyle_deploy.bundle import Bundle, read_bundle
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.processor import usable_cores

BUNDLE = Path("engines/demo-faces")
RESULTS = Path("benchmarks/results")
CPU_BACKENDS = tuple(name for name, row in BACKENDS.items() if row.device == "cpu")
OPTIONS = BenchOptions(steps=(1, 2, 3, 5, 10), repeats=50, picture_count=0, resume=True)


@click.command(help=__doc__)
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--work", type=click.Path(file_okay=False, path_type=Path), default=Path("out/demo-faces"), show_default=True
)
def main(archive: Path, work: Path) -> None:
    """Bench the bundle on the 200 portraits held out."""
    _, held_out = load_portraits(archive)
    # Means of four bytes, rounded: the measured inputs are 8-bit images, as a user's are.
    grey = (
        np.rint((reduce_to_64(held_out.pixels).numpy()[:, 0] + 1) * 127.5).astype(np.uint8)[..., None].repeat(3, axis=3)
    )
    images = [(Path(name).stem, image) for name, image in zip(held_out.names, grey, strict=True)]
    bundle = prepare_bundle(work)
    click.echo(format_table(measure(images, bundle=bundle, work=work / "bench", results=RESULTS, options=OPTIONS)))


def prepare_bundle(work: Path) -> Path:
    """Return a copy of the shipped bundle, with tuned engines of all CPU backends and precisions that can run here."""
    bundle = work / BUNDLE.name
    if not bundle.exists():
        shutil.copytree(BUNDLE, bundle)
    files = ModelFiles(name=BUNDLE.name, bundle=bundle)
    build_engines(files, list(CONTENDERS.values()), usable_cores(), lambda text: click.echo(text, err=True))
    return bundle


def choose_configurations(bundle: Bundle) -> tuple[Configuration, ...]:
    """Return one configuration for each backend of the CPU in float32, and in each other precision that can run here.

    A backend that cannot run here keeps its row, which says why. Engines are taken where the bundle has them.
    """
    chosen: list[Configuration] = []
    for backend in CPU_BACKENDS:
        usable = [each for each in PRECISIONS if each == EXACT_PRECISION or _can_run(backend, each)]
        options = MatrixOptions(backends=(backend,), device="cpu", precisions=tuple(usable))
        chosen += configurations_of(bundle, options)
    return tuple(chosen)


def _can_run(backend: str, precision: str) -> bool:
    try:
        load_backend(backend).check_options(RunnerOptions(device="cpu", precision=precision))
    except BackendUnavailableError:
        return False
    return True


def measure(
    images: list[tuple[str, NDArray[np.uint8]]], *, bundle: Path, work: Path, results: Path, options: BenchOptions
) -> Report:
    """Bench a bundle in all configurations of the CPU, and keep report and chart.

    Args:
        images: names and uint8 [H, W, 3].
        bundle: its directory; a backend takes its engine there, or the exported graphs.
        work: folder of the bench.
        results: folder of `demo-faces.json` and `demo-faces.png`.
        options: how it is measured.
    """
    opened = read_bundle(bundle)
    report = run_bench(opened, images, work, choose_configurations(opened), options)
    results.mkdir(parents=True, exist_ok=True)
    for name, kept in ((REPORT_NAME, "demo-faces.json"), (f"{CHART_NAME}.png", "demo-faces.png")):
        shutil.copyfile(work / name, results / kept)
    return report


if __name__ == "__main__":
    main()
