"""Exceptions of the package. A message says the fact, what was got, what was expected and the command that mends it."""


class RestyleDeployError(Exception):
    """Base of every error that a user can cause or mend; the CLI prints it as one line and exits with 1."""


class CheckpointError(RestyleDeployError):
    """A checkpoint cannot be read, or does not hold the weights that its options announce."""


class ExportError(RestyleDeployError):
    """A model cannot be turned into graphs, or the graphs do not compute what the model computes."""


class BuildError(RestyleDeployError):
    """A backend cannot turn a graph into an engine."""


class BundleError(RestyleDeployError):
    """A bundle is missing, damaged, of an unknown format, or reaches outside its directory."""


class ShapeError(RestyleDeployError):
    """An array has another shape or dtype than the graph or the session expects."""


class BackendUnavailableError(RestyleDeployError):
    """A backend or a device cannot run here; the message names what is missing."""


class VerificationError(RestyleDeployError):
    """A result differs from the stored or the reference result, or is not finite."""


class ImageError(RestyleDeployError):
    """An image file cannot be read, or must not be (too large)."""


class ReportError(RestyleDeployError):
    """A benchmark's report is missing, incomplete or of an unknown format, or cannot be written."""


class MetricError(RestyleDeployError):
    """A quality metric cannot be measured; the message names what is missing."""


class DeviceError(RestyleDeployError):
    """A GPU refused something: memory, a launch, a capture; or work on it failed."""
