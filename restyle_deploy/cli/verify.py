"""The command `restyle-deploy verify`."""

import json
from pathlib import Path

import click

from restyle_deploy.cli.options import bundle_argument, json_option, session_options


@click.command()
@bundle_argument
@session_options
@json_option
def verify(
    bundle: Path, backend: str, device: str, threads: int | None, precision: str, plain: bool, as_json: bool
) -> None:
    """Check BUNDLE's files against their hashes, and its results against those of the reference model.

    Exits with 1 if a file has changed, or if latents differ by more than 1e-4 or images by more than 1e-3 (bf16: 2e-2
    and 0.1).

    Example: restyle-deploy verify engines/demo-faces
    """
    from restyle_deploy.verify import check_parity, verify_bundle

    parity = verify_bundle(bundle, backend=backend, device=device, threads=threads, precision=precision, plain=plain)
    if as_json:
        click.echo(json.dumps({"ok": parity.is_within_tolerance, **parity.as_json()}, indent=2))
    check_parity(parity, str(bundle))
    if not as_json:
        click.echo("files: unchanged")
        for step, errors in enumerate(zip(parity.latent_errors, parity.image_errors, strict=True), start=1):
            click.echo(f"step {step}: largest difference: latents {errors[0]:.1e}, images {errors[1]:.1e}")
        click.echo(f"{bundle}: ok")
