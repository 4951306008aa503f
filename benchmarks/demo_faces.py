"""Measure the shipped demo model on the portraits that were held out of its training, with every backend of the CPU.

    python -m benchmarks.demo_faces ARCHIVE

Writes benchmarks/results/demo-faces.json (a report as `restyle-deploy bench` writes it) and its chart. No portrait and
no rendered image is kept. A run that is interrupted goes on where it was: its finished parts are in --work.
"""

import shutil
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from examples.demo_model.portraits import load_portraits, reduce_to_64
from restyle_deploy.backends import BACKENDS
from restyle_deploy.bench.charts import CHART_NAME
from restyle_deploy.bench.matrix import MatrixOptions, configurations_of
from restyle_deploy.bench.report import Report
from restyle_deploy.bench.run import REPORT_NAME, run_bench
from restyle_deploy.bench.schedule import BenchOptions
from restyle_deploy.bench.tables import format_table
from restyle_deploy.bundle import read_bundle

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
    click.echo(format_table(measure(images, bundle=BUNDLE, work=work, results=RESULTS, options=OPTIONS)))


def measure(
    images: list[tuple[str, NDArray[np.uint8]]], *, bundle: Path, work: Path, results: Path, options: BenchOptions
) -> Report:
    """Bench a bundle on all backends of the CPU, and keep report and chart.

    Args:
        images: names and uint8 [H, W, 3].
        bundle: its directory; a backend takes its engine there, or the exported graphs.
        work: folder of the bench.
        results: folder of `demo-faces.json` and `demo-faces.png`.
        options: how it is measured.
    """
    opened = read_bundle(bundle)
    configurations = configurations_of(opened, MatrixOptions(backends=CPU_BACKENDS, device="cpu"))
    report = run_bench(opened, images, work, configurations, options)
    results.mkdir(parents=True, exist_ok=True)
    for name, kept in ((REPORT_NAME, "demo-faces.json"), (f"{CHART_NAME}.png", "demo-faces.png")):
        shutil.copyfile(work / name, results / kept)
    return report


if __name__ == "__main__":
    main()
