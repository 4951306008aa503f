"""The reference model beside a session: in the same process, under the same rules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.libraries import require_reference_libraries
from restyle_deploy.bundle import Bundle
from restyle_deploy.runtime.session import InversionResult, Session
from restyle_deploy.verify import STEPS, check_parity, compare_with_reference, load_expectation

if TYPE_CHECKING:
    from restyle_deploy.models.restyle import RestyleModel


class TorchReference:
    """The torch model of a bundle, called as a session is."""

    def __init__(self, model: RestyleModel, average_image: NDArray[np.float32]) -> None:
        self._model, self._average_image = model, average_image

    def invert(self, images: NDArray[Any], *, steps: int, every_step: bool = False) -> InversionResult:
        """Invert images as `Session.invert` does, in one batch."""
        from restyle_deploy.reference import invert_with_model

        return invert_with_model(
            self._model, images, average_image=self._average_image, steps=steps, every_step=every_step
        )

    def describe(self) -> dict[str, Any]:
        """Return library, version and threads, for reports."""
        import torch

        return {"library": "torch", "version": str(torch.__version__), "threads": torch.get_num_threads()}


@contextmanager
def open_torch_reference(bundle: Bundle, *, threads: int | None) -> Iterator[TorchReference]:
    """Rebuild the torch model from a bundle's graphs; torch's threads are set meanwhile.

    Args:
        bundle: an opened bundle.
        threads: those of the session; None leaves the choice to torch.
    Raises:
        BackendUnavailableError: torch or onnx is not installed.
        BundleError: see `reference.model_from_bundle`.
    """
    require_reference_libraries()
    import torch

    from restyle_deploy.reference import model_from_bundle

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield TorchReference(model_from_bundle(bundle), bundle.average_image)
    finally:
        torch.set_num_threads(before)


def check_reference(reference: TorchReference, session: Session) -> None:
    """Raise `VerificationError` unless an exact session and the reference model compute the same at every step."""
    inputs = load_expectation(session.bundle.expectation).inputs
    expected = reference.invert(inputs, steps=STEPS, every_step=True)
    check_parity(compare_with_reference(session, inputs, expected), session.bundle.path.name)
