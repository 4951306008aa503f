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
    help="Exit with 1 if a row of B is slower or worse by more than this, beyond doubt; or if a row or metric of A is "
    "missing in B.",
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
    interval (95 %), how quality has changed over the same images, and a verdict. Where both reports were measured with
    --against beside the same reference model, the ratio is that of the ratios to it, which a slower day of the machine
    leaves alone.

    \b
    Verdicts:
      slower, faster  the whole interval is above 1, or below
      same            all of it is within the tolerance (--fail-above, else 3 %)
      unclear         the interval is wider; or there are fewer than 5 calls;
                      or times are called unstable in one of the reports, and
                      no reference model was measured beside both of them
      missing, new    in A alone, or in B alone

    With --fail-above 5 % a row fails if it is slower and its ratio above 1.05; if a metric's whole interval is on the
    worse side and its mean has changed by more than 5 %; if the row, or a metric that A has, is missing in B. An
    unclear row does not fail, and has not passed: it is told below the table. Of fewer than 5 images no quality is
    called worse. Quality of other images, or by another model, is not compared, with a note.

    Reports of unlike machines or bundles are refused, with exit status 1. Of the system's build and the GPU driver's
    patch level there is a note. docs/deciding.md has all rules.

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
