"""Invert in the middle of a PyTorch pipeline: tensors in, tensors out, no copy and no wait between.

    python -m examples.torch_pipeline engines/demo-faces examples/photos -o out/torch --backend pytorch --device cuda:0

On a GPU the session reads the tensor where it is, returns at once, and its results are views of its own memory; DLPack
orders its stream and torch's. On the CPU the same lines share memory with NumPy's arrays.
"""

from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.dlpack import from_dlpack

from restyle_deploy import Session
from restyle_deploy.errors import RestyleDeployError
from restyle_deploy.runtime.images import save_image
from restyle_deploy.runtime.inputs import find_images, load_images


def reconstruct(session: Session, pictures: Tensor, *, steps: int | None = None) -> tuple[Tensor, Tensor]:
    """Invert pictures on the session's device.

    Args:
        session: opened on the device of the pictures.
        pictures: uint8 [N, H, W, 3], or float32 [N, 3, h, w] in [-1, 1] of the encoder's size; contiguous.
        steps: None for the session's.
    Returns:
        Images [N, 3, R, R'] and latents [N, n_styles, style_dim], float32. On a GPU they are views, and perhaps still
        being computed: work that torch enqueues waits for them by itself. The memory goes to a later call when the last
        tensor that shares it is gone, so keep a `.clone()` of what is kept for long.
    """
    inversion = session.invert(pictures, steps=steps)
    return from_dlpack(inversion.images), from_dlpack(inversion.latents)


def measure_errors(images: Tensor, pictures: Tensor) -> Tensor:
    """Return the mean absolute error of each image: [N], in shares of the range.

    Args:
        images: [N, 3, R, R'] in [-1, 1].
        pictures: uint8 [N, h, w, 3] of the encoder's size.
    """
    targets = pictures.permute(0, 3, 1, 2).float() / 255
    height, width = targets.shape[2:]
    reduced = functional.adaptive_avg_pool2d(images.clamp(-1, 1) / 2 + 0.5, (height, width))
    return (reduced - targets).abs().mean(dim=(1, 2, 3))


def pixels_from_images(images: Tensor) -> Tensor:
    """Return [N, 3, R, R'] in [-1, 1] as uint8 [N, R, R', 3], truncated as upstream saves them."""
    return ((images + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8).permute(0, 2, 3, 1)


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@click.option("--backend", default="pytorch", show_default=True, help="A row of restyle_deploy.backends.BACKENDS.")
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda:0 and so on.")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(min=1))
def main(bundle: Path, images: tuple[Path, ...], output: Path, backend: str, device: str, steps: int) -> None:
    """Print the error of each image, and write what it became."""
    try:
        with Session.open(bundle, backend=backend, device=device) as session:
            loaded, failures = load_images(find_images(images), session.config.input_shape)
            if failures:
                raise click.ClickException("; ".join(failures))
            pictures = torch.from_numpy(np.stack([picture for _, picture in loaded])).to(device)
            results, _ = reconstruct(session, pictures, steps=steps)
            errors = measure_errors(results, pictures)
            pixels = pixels_from_images(results).cpu().numpy()  # here, and nowhere before, the host waits
            for (stem, _), error, image in zip(loaded, errors.tolist(), pixels, strict=True):
                save_image(output / f"{stem}.png", image)
                click.echo(f"{stem}: mean error {error:.3f}")
    except RestyleDeployError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
