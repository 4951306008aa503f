"""The command `restyle-deploy compare`."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from restyle_deploy.cli.options import json_option


def _parse_share(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Return "5%" or "5" as 0.05."""
    if value is None:
        return None
    try:
        share = float(value.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise click.BadParameter(f"{value!r} is no percentage such as 5%, 0 or more")
    return share


@click.command()
@click.argument("first", type=click.Path(path_type=Path), metavar="A.json")
@click.argument("second", type=click.Path(path_type=Path), metavar="B.json")
@click.option(
    "--fail-above",
    metavar="PERCENT",
    callback=_parse_share,
    help="Exit with 1 if a row of B is slower or worse by more than this, or missing.",
)
@click.option(
    "--allow-different-environments",
    is_flag=True,
    help="Compare reports of different machines or bundles all the same.",
)
@json_option
@click.pass_context
def compare(
    context: click.Context,
    /,
    first: Path,
    second: Path,
    fail_above: float | None,
    allow_different_environments: bool,
    as_json: bool,
) -> None:
    """Compare two reports of `restyle-deploy bench`: A.json is what was, B.json what is now.

    Prints for each configuration and step count the ratio of the latencies (above 1, B is slower) with a bootstrap
    interval, how quality has changed over the same images, and a verdict. Where both reports were measured with
    --against, the ratio is that of the ratios to the reference model, which a slower day of the machine leaves alone.
    Reports of unlike machines or bundles are refused, with exit status 1.

    Example: restyle-deploy compare main/report.json branch/report.json --fail-above 5%
    """
    from restyle_deploy.bench.compare import compare_reports
    from restyle_deploy.bench.compare_table import format_comparison, notes_of_pair
    from restyle_deploy.bench.report import read_report

    reports = read_report(first), read_report(second)
    cells = compare_reports(*reports, fail_above=fail_above, different_allowed=allow_different_environments)
    for note in notes_of_pair(*reports):
        click.echo(f"Note: {note}", err=True)
    if as_json:
        click.echo(json.dumps([asdict(cell) for cell in cells], indent=2, allow_nan=False))
    else:
        click.echo(format_comparison(cells, reports[1].metrics))
    context.exit(1 if any(cell.failures for cell in cells) else 0)
