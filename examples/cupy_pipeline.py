"""Invert arrays of CuPy or PyCUDA on a GPU, on a stream of the caller's, by `__cuda_array_interface__`.

    python -m examples.cupy_pipeline engines/demo-faces examples/photos -o out/cupy --library cupy

The library's own work, the inversion, and what the library does with the result are ordered by the stream. The host
waits once, for the pixels that it writes to files.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import click
import numpy as np
from numpy.typing import NDArray

from restyle_deploy import Session
from restyle_deploy.errors import RestyleDeployError
from restyle_deploy.runtime.images import save_image
from restyle_deploy.runtime.inputs import find_images, load_images

Pixels = NDArray[np.uint8]


def invert_with_cupy(session: Session, pictures: Pixels, *, steps: int) -> Pixels:
    """Mirror pictures, invert them, and mirror what they became.

    Args:
        session: on the GPU that is CuPy's current one.
        pictures: [N, H, W, 3].
        steps: refinement steps.
    Returns:
        [N, R, R', 3].
    """
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        mirrored = cupy.ascontiguousarray(cupy.asarray(pictures)[:, :, ::-1])
        inversion = session.invert(mirrored, steps=steps, image_type="uint8", stream=stream.ptr)
        # By DLPack the stream waits. `cupy.asarray`, by the other protocol, would let the host wait.
        images = cupy.from_dlpack(inversion.images)[:, :, ::-1]
        result: Pixels = cupy.asnumpy(images, stream=stream)
    return result


def invert_with_pycuda(session: Session, pictures: Pixels, *, steps: int) -> Pixels:
    """Invert pictures on the first GPU; see `invert_with_cupy`."""
    import pycuda.autoprimaryctx  # noqa: F401  # the context that the session works in, too
    from pycuda import driver, gpuarray

    stream = driver.Stream()
    uploaded = gpuarray.to_gpu_async(np.ascontiguousarray(pictures), stream=stream)
    inversion = session.invert(uploaded, steps=steps, image_type="uint8", stream=stream.handle)
    interface = inversion.images.__cuda_array_interface__
    images = gpuarray.GPUArray(interface["shape"], np.uint8, gpudata=interface["data"][0])
    result: Pixels = images.get_async(stream=stream)
    stream.synchronize()  # the memory is that of `inversion`, which lives until here
    return result


LIBRARIES: Mapping[str, Callable[..., Pixels]] = MappingProxyType(
    {"cupy": invert_with_cupy, "pycuda": invert_with_pycuda}
)


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@click.option("--library", default="cupy", show_default=True, type=click.Choice(tuple(LIBRARIES)))
@click.option("--backend", default="pytorch", show_default=True, help="A row of restyle_deploy.backends.BACKENDS.")
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--steps", default=5, show_default=True, type=click.IntRange(min=1))
def main(
    bundle: Path, images: tuple[Path, ...], output: Path, library: str, backend: str, device: str, steps: int
) -> None:
    """Write what the images became."""
    try:
        with Session.open(bundle, backend=backend, device=device) as session:
            loaded, failures = load_images(find_images(images), session.config.input_shape)
            if failures:
                raise click.ClickException("; ".join(failures))
            pixels = LIBRARIES[library](session, np.stack([picture for _, picture in loaded]), steps=steps)
    except RestyleDeployError as error:
        raise click.ClickException(str(error)) from None
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library:
            raise
        raise click.ClickException(f"{library} is not installed; see its site for the package of your CUDA") from None
    for (stem, _), image in zip(loaded, pixels, strict=True):
        save_image(output / f"{stem}.png", image)
        click.echo(f"written: {output / stem}.png")


if __name__ == "__main__":
    main()
