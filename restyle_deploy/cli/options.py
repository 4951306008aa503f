"""Arguments and options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from restyle_deploy.backends import BACKENDS
from restyle_deploy.backends.base import EXACT_PRECISION, PRECISIONS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
images_argument = click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
preview_option = click.option(
    "--preview-steps", is_flag=True, help="Render all steps but the last only up to the encoder's size (approximate)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def session_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --backend, --device, --threads, --precision and --plain."""
    options: list[Decorator] = [
        click.option(
            "--backend",
            type=click.Choice(list(BACKENDS)),
            default="onnxruntime",
            show_default=True,
            help="Library that runs the graphs.",
        ),
        click.option("--device", default="cpu", show_default=True, help="Device that the backend runs on."),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            show_default="the backend's choice",
            help="CPU threads of one run.",
        ),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            default=EXACT_PRECISION,
            show_default=True,
            help="What the backend computes in; bf16 is approximate.",
        ),
        click.option("--plain", is_flag=True, help="Run the exported graphs, even where an engine has been built."),
    ]
    for option in reversed(options):
        command = option(command)
    return command
