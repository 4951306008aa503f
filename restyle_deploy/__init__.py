"""ReStyle GAN inversion, exported and deployed."""

from restyle_deploy.errors import RestyleDeployError
from restyle_deploy.runtime.results import DeviceInversion, InversionTimings, PendingInversion
from restyle_deploy.runtime.session import InversionResult, Session

__all__ = [
    "DeviceInversion",
    "InversionResult",
    "InversionTimings",
    "PendingInversion",
    "RestyleDeployError",
    "Session",
]
__version__ = "0.1.0"
