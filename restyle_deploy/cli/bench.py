"""The command `restyle-deploy bench`."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from restyle_deploy.bench.libraries import REFERENCES
from restyle_deploy.cli.options import bundle_argument, images_argument, json_option, preview_option, session_options

DEFAULT_STEPS = "1,2,3,5,10"


def _parse_steps(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        steps = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of whole numbers such as {DEFAULT_STEPS}") from None
    if min(steps) < 1 or len(set(steps)) < len(steps):
        raise click.BadParameter(f"{value!r}: each step count is at least 1 and given once")
    return steps


@click.command()
@bundle_argument
@images_argument
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of report and charts.")
@click.option("--steps", default=DEFAULT_STEPS, show_default=True, callback=_parse_steps, help="Step counts.")
@click.option("--warmup", type=click.IntRange(min=0), default=2, show_default=True, help="Calls before measuring.")
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True, help="Measured calls.")
@click.option("--strips", type=click.IntRange(min=0), default=8, show_default=True, help="Draw so many image strips.")
@click.option("--against", type=click.Choice(REFERENCES), help="Also measure the reference model, in the same rounds.")
@session_options
@preview_option
@json_option
@click.pass_context
def bench(
    context: click.Context,
    /,
    bundle: Path,
    images: tuple[Path, ...],
    output: Path,
    steps: tuple[int, ...],
    warmup: int,
    repeats: int,
    strips: int,
    against: str | None,
    preview_steps: bool,
    as_json: bool,
    **session_choices: Any,
) -> None:
    """Chart quality against latency of BUNDLE on IMAGES (files or folders) for several step counts.

    Writes report.json, the charts drawn from it, and strips of images. Quality (MSE on [-1,1], PSNR, SSIM) is counted
    at the encoder's input size; latency is one image's. Needs the extra: pip install 'restyle-deploy[bench]'.

    The approximate modes --precision bf16 and --preview-steps are measured together with the exact session, and
    compared with it. --against torch rebuilds the reference model from BUNDLE (needs the extra `export`).

    Example: restyle-deploy bench engines/demo-faces examples/photos -o out --steps 1,2,3,5,10
    """
    from tqdm import tqdm

    from restyle_deploy.backends.base import EXACT_PRECISION
    from restyle_deploy.bench.report import format_table
    from restyle_deploy.bench.run import REPORT_NAME, run_bench
    from restyle_deploy.errors import ImageError
    from restyle_deploy.runtime.inputs import find_images, load_images
    from restyle_deploy.runtime.session import Session

    inputs = find_images(images, output=output)
    with ExitStack() as stack:
        session = stack.enter_context(Session.open(bundle, preview_steps=preview_steps, **session_choices))
        exact = None
        if session.is_approximate:
            exact = stack.enter_context(Session.open(bundle, **{**session_choices, "precision": EXACT_PRECISION}))
        bar = stack.enter_context(tqdm(unit="step", file=sys.stderr, disable=None))
        loaded, failures = load_images(inputs, session.config.input_shape)
        for failure in failures:
            click.echo(f"Error: {failure}", err=True)
        if not loaded:
            raise ImageError("no image could be read; nothing was measured")

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = run_bench(
            session,
            loaded,
            output,
            steps=steps,
            warmup=warmup,
            repeats=repeats,
            progress=show,
            strip_count=strips,
            exact=exact,
            against=against,
        )
    if as_json:
        click.echo((output / REPORT_NAME).read_text(encoding="utf-8"), nl=False)
    else:
        click.echo(format_table(report))
        click.echo(f"\nreport, charts and strips: {output}")
    context.exit(1 if failures else 0)
