"""The command `restyle-deploy export`."""

import importlib.util
import json
from pathlib import Path

import click

from restyle_deploy.cli.options import json_option
from restyle_deploy.errors import BackendUnavailableError


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the new bundle.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="TOML file that wins over the checkpoint's options: export/*.toml.",
)
@click.option("--overwrite", is_flag=True, help="Replace the bundle that is there.")
@json_option
def export(checkpoint: Path, output: Path, recipe: Path | None, overwrite: bool, as_json: bool) -> None:
    """Export an official CHECKPOINT (.pt) as a bundle, and verify it.

    The torch model and the exported graphs run 3 steps on the same images; latents must agree within 1e-4 and images
    within 1e-3, else there is no bundle. Needs the extra: pip install 'restyle-deploy[export]'.

    Example: restyle-deploy export restyle_psp_ffhq_encode.pt -o faces
    """
    _require_libraries()
    from restyle_deploy.export import export_checkpoint

    parity = export_checkpoint(
        checkpoint,
        output,
        recipe=recipe,
        overwrite=overwrite,
        progress=lambda stage: click.echo(f"{stage} …", err=True),
    )
    if as_json:
        click.echo(json.dumps({"bundle": str(output), "verification": parity.as_json()}, indent=2))
        return
    click.echo(
        f"{output}: verified; largest difference from the reference model: "
        f"latents {max(parity.latent_errors):.1e}, images {max(parity.image_errors):.1e}"
    )


def _require_libraries() -> None:
    missing = [name for name in ("torch", "onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise BackendUnavailableError(
            f"export needs {', '.join(missing)}, which is not installed; run: pip install 'restyle-deploy[export]'"
        )
