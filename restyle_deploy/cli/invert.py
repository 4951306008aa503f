"""The command `restyle-deploy invert`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from restyle_deploy.cli.options import bundle_argument, images_argument, json_option, preview_option, session_options


@click.command()
@bundle_argument
@images_argument
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Refinement steps.")
@click.option(
    "--every-step",
    is_flag=True,
    help="Also write each step, as step-<k>/<name>.png; the official layout always has them.",
)
@click.option(
    "--official-layout",
    is_flag=True,
    help="Write inference_results/<step>/<name> and latents.npy (pickled) as the official scripts do.",
)
@click.option("--resize", is_flag=True, help="Write images of the encoder's input size (official: --resize_outputs).")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Images of one run.")
@session_options
@preview_option
@json_option
@click.pass_context
def invert(
    context: click.Context,
    bundle: Path,
    images: tuple[Path, ...],
    output: Path,
    steps: int,
    every_step: bool,
    official_layout: bool,
    resize: bool,
    batch_size: int,
    backend: str,
    device: str,
    threads: int | None,
    precision: str,
    plain: bool,
    preview_steps: bool,
    as_json: bool,
) -> None:
    """Invert IMAGES (files or folders) with BUNDLE: an image each at the model's full size, and latents.npz.

    Files may be of any type that can be read; in folders the extension decides, and stderr tells what was passed over.
    Of an animated image the first frame is taken.

    A file that cannot be read is named on stderr; the others are done, and the exit status is 1.

    Example: restyle-deploy invert engines/demo-faces examples/photos -o out --steps 5
    """
    from tqdm import tqdm

    from restyle_deploy.runtime.folder import FolderOptions, find_skipped, invert_files
    from restyle_deploy.runtime.inputs import find_images
    from restyle_deploy.runtime.session import Session

    if preview_steps and (every_step or official_layout):
        raise click.UsageError("--preview-steps renders the last step only, but every step is to be written")
    inputs = find_images(images, output=output)
    batch_size = min(batch_size, len(inputs))  # memory is allocated for as many
    options = FolderOptions(
        steps=steps,
        every_step=every_step,
        official_layout=official_layout,
        resized=resize,
        batch_size=batch_size,
    )
    _tell_skipped(find_skipped(images, inputs, output=output))
    with (
        Session.open(
            bundle,
            backend=backend,
            device=device,
            threads=threads,
            precision=precision,
            plain=plain,
            preview_steps=preview_steps,
            max_batch=batch_size,
        ) as session,
        tqdm(total=len(inputs), unit="image", file=sys.stderr, disable=None) as bar,
    ):
        result = invert_files(
            session,
            inputs,
            output,
            options,
            progress=bar.update,
            report_failure=lambda path, reason: bar.write(f"Error: {reason}", file=sys.stderr),
        )
    if as_json:
        facts = {
            "output": str(output),
            "names": list(result.names),
            "images": [str(path) for path in result.images],
            "latents": str(result.latents) if result.latents else None,
            "failures": [{"path": str(path), "reason": reason} for path, reason in result.failures],
        }
        click.echo(json.dumps(facts, indent=2))
    else:
        done = f"{len(result.names)} of {_count(len(inputs), 'image')} inverted in {_count(steps, 'step')}"
        click.echo(f"{done}: {output}")
    context.exit(1 if result.failures else 0)


def _tell_skipped(files: Sequence[Path]) -> None:
    if files:
        extensions = sorted({file.suffix.lower() or "no extension" for file in files})
        click.echo(f"{_count(len(files), 'file')} passed over, by extension: {', '.join(extensions)}", err=True)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
