"""Measure the shipped demo model on the portraits that were held out of its training.

    python -m benchmarks.demo_faces ARCHIVE

Writes benchmarks/results/demo-faces.json (a report as `restyle-deploy bench` writes it) and its chart. No portrait and
no rendered image is kept.
"""

import shutil
import tempfile
from pathlib import Path

import click
import numpy as np

from examples.demo_model.portraits import load_portraits, reduce_to_64
from restyle_deploy import Session
from restyle_deploy.bench.charts import CHART_NAME
from restyle_deploy.bench.report import format_table
from restyle_deploy.bench.run import REPORT_NAME, run_bench

BUNDLE = Path("engines/demo-faces")
RESULTS = Path("benchmarks/results")
STEPS = (1, 2, 3, 5, 10)
REPEATS = 50


@click.command(help=__doc__)
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(archive: Path) -> None:
    """Bench the bundle on the 200 portraits held out."""
    _, held_out = load_portraits(archive)
    # Means of four bytes, rounded: the measured inputs are 8-bit images, as a user's are.
    grey = (
        np.rint((reduce_to_64(held_out.pixels).numpy()[:, 0] + 1) * 127.5).astype(np.uint8)[..., None].repeat(3, axis=3)
    )
    images = [(Path(name).stem, image) for name, image in zip(held_out.names, grey, strict=True)]
    with Session.open(BUNDLE) as session, tempfile.TemporaryDirectory() as folder:
        report = run_bench(session, images, Path(folder), steps=STEPS, repeats=REPEATS, strip_count=0)
        for name, kept in ((REPORT_NAME, "demo-faces.json"), (f"{CHART_NAME}.png", "demo-faces.png")):
            shutil.copyfile(Path(folder) / name, RESULTS / kept)
    click.echo(format_table(report))


if __name__ == "__main__":
    main()
