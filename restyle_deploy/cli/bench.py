"""The command `restyle-deploy bench`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from restyle_deploy.bench.libraries import REFERENCES
from restyle_deploy.cli.bench_options import (
    matrix_options,
    metric_options,
    parse_minimums,
    parse_numbers,
    parse_seconds,
    parse_shares,
)
from restyle_deploy.cli.options import bundle_argument, images_argument, json_option

if TYPE_CHECKING:
    from restyle_deploy.bench.matrix import MatrixOptions
    from restyle_deploy.bench.schedule import BenchOptions

DEFAULT_STEPS = "1,2,3,5,10"
MOST_RATE = 1e4  # calls per second: all arrivals are drawn beforehand


def _parse_loads(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the shares and the rates (calls per second) in a list such as 0.5,0.9,12/s."""
    parts = value.split(",") if value else []
    shares = ",".join(part for part in parts if not part.endswith("/s"))
    try:
        rates = tuple(float(part.removesuffix("/s")) for part in parts if part.endswith("/s"))
    except ValueError:
        rates = (0.0,)
    if any(not 0 < rate <= MOST_RATE for rate in rates):
        raise click.BadParameter(
            f"{value!r}: a rate such as 12/s is above 0 and at most {MOST_RATE:g} calls per second"
        )
    try:
        return parse_shares(context, parameter, shares), rates
    except click.BadParameter as error:
        raise click.BadParameter(f"{error.message}; calls per second are written as 12/s") from None


@click.command()
@bundle_argument
@images_argument
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of report and charts.")
@click.option("--steps", default=DEFAULT_STEPS, show_default=True, callback=parse_numbers, help="Step counts.")
@matrix_options
@click.option(
    "--warmup", type=click.IntRange(min=0), show_default="until stable", help="Calls before measuring, a fixed number."
)
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True, help="Measured calls.")
@click.option("--sweep", "sweeps", is_flag=True, help="Double the batch while throughput grows and memory lasts.")
@click.option(
    "--max-batch",
    "most_batch",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Where --sweep ends at the latest.",
)
@click.option(
    "--load",
    "loads",
    callback=_parse_loads,
    help="Also let calls arrive at random, at these rates: shares of what is done in a second, or calls (of --batch "
    "images each) per second, as 0.5,0.9,12/s.",
)
@click.option("--load-seconds", type=click.FloatRange(min=0.1), default=20.0, show_default=True, help="For each rate.")
@click.option("--against", type=click.Choice(REFERENCES), help="Also measure the reference model, in the same rounds.")
@metric_options
@click.option(
    "--strips", "picture_count", type=click.IntRange(min=0), default=8, show_default=True, help="Image strips."
)
@click.option(
    "--budget-ms",
    type=click.FloatRange(0, 1e9, min_open=True),
    help="Choose within this p95 of a call: by its upper bound from 59 calls on, else by the slowest call.",
)
@click.option(
    "--min-quality",
    "minimums",
    multiple=True,
    callback=parse_minimums,
    help="Choose with at least this mean, as psnr_db=20; repeatable. At most, where lower is better.",
)
@click.option("--time-budget", "time_budget_s", callback=parse_seconds, help="Stop after this time, as 15m.")
@click.option("--resume", is_flag=True, help="Keep what a former run of the same bench has finished.")
@json_option
@click.pass_context
def bench(context: click.Context, /, bundle: Path, images: tuple[Path, ...], output: Path, **choices: Any) -> None:
    """Chart quality against latency of BUNDLE on IMAGES (files or folders) for several step counts.

    Each configuration (backend, precision, plan, batch) is measured in a process of its own. Writes report.json and,
    from it alone, charts, a page (report.html), Markdown and strips of images; deploy.toml holds the configuration that
    was chosen, for Session.open. Needs the extra: pip install 'restyle-deploy[bench]'.

    Approximate configurations are measured together with the exact session, and compared with it. --against torch
    rebuilds the reference model from BUNDLE (needs the extra `export`). A configuration that fails has a row that says
    why; the exit status is 1 then, and where nothing meets --budget-ms and --min-quality. A batch that --sweep added
    and that needs more memory than there is ends the sweep, and is no failure. After Ctrl-C, --resume goes on with what
    is not measured yet.

    All backends at two batches, and a choice within 200 ms: --backend all --batch 1,4 --budget-ms 200.

    Example: restyle-deploy bench engines/demo-faces examples/photos -o out --steps 1,2,3,5,10
    """
    from restyle_deploy.bench.matrix import configurations_of
    from restyle_deploy.bench.run import REPORT_NAME, run_bench
    from restyle_deploy.bench.tables import format_table, is_memory_short
    from restyle_deploy.bundle import read_bundle
    from restyle_deploy.errors import ImageError
    from restyle_deploy.runtime.inputs import find_images, load_images

    as_json = choices.pop("as_json")
    inputs = find_images(images, output=output)
    opened = read_bundle(bundle)
    configurations = configurations_of(opened, _matrix_of(choices))
    loaded, failures = load_images(inputs, opened.config.input_shape)
    for failure in failures:
        click.echo(f"Error: {failure}", err=True)
    if not loaded:
        raise ImageError("no image could be read; nothing was measured")
    stems = {stem for stem, _ in loaded}
    readable = [each.path for each in inputs if each.stem in stems]
    options = _options_of(choices)
    with _Bars() as bars:
        report = run_bench(opened, loaded, output, configurations, options, files=readable, progress=bars.show)
    if as_json:
        click.echo((output / REPORT_NAME).read_text(encoding="utf-8"), nl=False)
    else:
        click.echo(format_table(report))
        if report.decision is not None:
            click.echo(f"\n{report.decision.reason}")
        click.echo(f"\nreport, page, charts and strips: {output}")
    is_any_failed = bool(failures) or any(
        result.status == "failed" and (result.configuration in configurations or not is_memory_short(result))
        for result in report.configurations
    )
    has_limits = options.budget_ms is not None or bool(options.minimums)
    is_none_chosen = report.decision is None or report.decision.configuration is None
    context.exit(1 if is_any_failed or (has_limits and is_none_chosen) else 0)


def _matrix_of(choices: dict[str, Any]) -> "MatrixOptions":
    """Take what says which configurations are measured out of the command's choices."""
    from restyle_deploy.bench.matrix import MatrixOptions

    previews = (False, True) if choices.pop("preview_steps") else (False,)
    names = ("backends", "device", "precisions", "plans", "batches", "threads")
    return MatrixOptions(previews=previews, **{name: choices.pop(name) for name in names})


def _options_of(choices: dict[str, Any]) -> "BenchOptions":
    """Return the rest of the command's choices, the metrics' as one."""
    from restyle_deploy.bench.metrics import MetricOptions
    from restyle_deploy.bench.schedule import BenchOptions

    names, minimums = choices.pop("metric_names"), choices["minimums"]
    left_out = [name for name in minimums if names is not None and name not in names]
    if left_out:
        raise click.UsageError(f"--min-quality of {', '.join(left_out)}, which is not among --metrics")
    choices["load_shares"], choices["load_rates"] = choices.pop("loads")
    files = {name: choices.pop(name) for name in list(choices) if name.startswith(("identity_", "lpips_"))}
    return BenchOptions(metrics=MetricOptions(names=names, **files), **choices)


class _Bars:
    """A progress bar for the configuration that is being measured; on a terminal only."""

    def __init__(self) -> None:
        self._name, self._bar = "", None

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, name: str, done: int, total: int) -> None:
        """Show how far a configuration is."""
        from tqdm import tqdm

        if name != self._name:
            self.__exit__()
            self._name, self._bar = name, tqdm(unit="step", file=sys.stderr, disable=None, desc=name)
        assert self._bar is not None
        self._bar.total = total
        self._bar.update(done - self._bar.n)
