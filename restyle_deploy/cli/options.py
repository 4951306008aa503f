"""Arguments and options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from restyle_deploy.backends import BACKENDS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
images_argument = click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def session_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --backend, --device and --threads."""
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
    ]
    for option in reversed(options):
        command = option(command)
    return command
