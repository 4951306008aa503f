"""`restyle-deploy`: the group of all commands."""

import errno
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from restyle_deploy import __version__
from restyle_deploy.cli.bench import bench
from restyle_deploy.cli.build import build
from restyle_deploy.cli.compare import compare
from restyle_deploy.cli.doctor import doctor
from restyle_deploy.cli.export import export
from restyle_deploy.cli.inspect import inspect
from restyle_deploy.cli.invert import invert
from restyle_deploy.cli.report import report
from restyle_deploy.cli.verify import verify
from restyle_deploy.errors import RestyleDeployError

# As shells have it for a program that Ctrl-C has ended: 128 and the number of the signal.
_INTERRUPTED = 130


class _Group(click.Group):
    """Print what a user can mend as one line and exit with 1; anything else keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RestyleDeployError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno in (None, errno.EPIPE):  # not the system's; or a closed pipe, which click ends quietly
                raise
            place = "" if error.filename is None else f"{error.filename}: "
            raise click.ClickException(f"{place}{error.strerror}") from error
        except KeyboardInterrupt:
            click.echo("\nAborted!", err=True)  # where click itself would exit with 1
            ctx.exit(_INTERRUPTED)


@click.group(cls=_Group)
@click.version_option(__version__)
@click.option(
    "-v",
    "--verbose",
    count=True,
    help="Before the command: show on stderr what is logged, INFO, and twice DEBUG too. Warnings are always shown.",
)
@click.pass_context
def main(context: click.Context, verbose: int) -> None:
    """Export ReStyle GAN-inversion checkpoints, run them without PyTorch, and measure them.

    \b
    Example:
      restyle-deploy export restyle_psp_ffhq_encode.pt -o faces
      restyle-deploy build faces --backend onnxruntime --tune
      restyle-deploy invert faces photos -o out
      restyle-deploy -v build faces --backend tensorrt-rtx
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # the name of a file may hold what its encoding cannot express
        sys.stdout.reconfigure(errors="backslashreplace")
    if verbose:
        context.with_resource(_log_on_stderr(logging.INFO if verbose == 1 else logging.DEBUG))


@contextmanager
def _log_on_stderr(level: int) -> Iterator[None]:
    """Show what this package logs, and what libraries log through it; other packages' warnings are shown as ever."""
    logger = logging.getLogger("restyle_deploy")
    handler, former = logging.StreamHandler(), logger.level
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(former)


for command in (export, build, invert, bench, report, compare, verify, inspect, doctor):
    main.add_command(command)
