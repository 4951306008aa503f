"""What tests of sessions on a `RecordingDevice` share. Their images are of 32 px."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy import Session
from restyle_deploy.runtime.results import DeviceInversion
from tests.recording import RecordingDevice


def targets_of(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Return random images, prepared."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, 32, 32)).astype(np.float32)


def assert_is(found: NDArray[Any], values: NDArray[np.float64]) -> None:
    """Check that each [..., n, m] of `found` is filled with its value."""
    filled = np.broadcast_to(values.reshape(values.shape + (1,) * (found.ndim - values.ndim)), found.shape)
    np.testing.assert_allclose(found, filled, rtol=0, atol=1e-5)


def invert_on(session: Session, device: RecordingDevice, values: NDArray[Any], **options: Any) -> DeviceInversion:
    """Invert images that lie on the device."""
    result = session.invert(device.put(values), **options)
    assert isinstance(result, DeviceInversion)
    return result
