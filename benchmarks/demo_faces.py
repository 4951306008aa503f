"""Measure the shipped demo model on the portraits that were held out of its training.

    python -m benchmarks.demo_faces ARCHIVE

Writes benchmarks/results/demo-faces.json (a report as `restyle-deploy bench` writes it) and its chart. No portrait and
no rendered image is kept.
"""

import tempfile
from pathlib import Path

import click

from examples.demo_model.portraits import load_portraits, reduce_to_64
from restyle_deploy import Session
from restyle_deploy.bench.charts import draw_charts
from restyle_deploy.bench.report import format_table, write_report
from restyle_deploy.bench.run import run_bench
from restyle_deploy.runtime.images import uint8_from_images

BUNDLE = Path("engines/demo-faces")
RESULTS = Path("benchmarks/results")
STEPS = (1, 2, 3, 5, 10)
REPEATS = 50


@click.command(help=__doc__)
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(archive: Path) -> None:
    """Bench the bundle on the 200 portraits held out."""
    _, held_out = load_portraits(archive)
    grey = uint8_from_images(reduce_to_64(held_out.pixels).numpy().repeat(3, axis=1))
    images = [(Path(name).stem, image) for name, image in zip(held_out.names, grey, strict=True)]
    with Session.open(BUNDLE) as session, tempfile.TemporaryDirectory() as folder:
        report = run_bench(session, images, Path(folder), steps=STEPS, repeats=REPEATS, strip_count=0)
    path = RESULTS / "demo-faces.json"
    write_report(report, path)
    with tempfile.TemporaryDirectory() as folder:
        png, _ = draw_charts(path, Path(folder))
        (RESULTS / "demo-faces.png").write_bytes(png.read_bytes())
    click.echo(format_table(report))


if __name__ == "__main__":
    main()
