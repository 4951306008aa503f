"""The command `restyle-deploy report`."""

from pathlib import Path

import click


@click.command()
@click.argument("report", type=click.Path(path_type=Path), metavar="REPORT.json")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    show_default="beside the report",
    help="Folder of charts, page and Markdown.",
)
def report(report: Path, output: Path | None) -> None:
    """Draw a report of `restyle-deploy bench` anew: charts, page and Markdown, from REPORT.json alone.

    Nothing is measured, and neither the bundle nor the images are needed; the page has strips of images where their
    folder, images, is beside the report. Prints the files that it has written. Needs the extra: pip install
    'restyle-deploy[bench]'.

    Example: restyle-deploy report out/report.json -o drawn
    """
    from restyle_deploy.bench.run import draw_report

    for file in draw_report(report, report.parent if output is None else output):
        click.echo(str(file))
