"""A bundle's exported graphs -> the torch model that they were made from: the reference where no checkpoint is at hand.

The exporter names each node after its module and folds constants. What it folded is undone where that is possible
(scales, layouts) and kept as an equal model where it is not: the noise becomes its own strength times one, and a batch
norm that went into its convolution becomes the identity with a bias.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from restyle_deploy.bundle import Bundle, GraphRecord
from restyle_deploy.errors import BundleError
from restyle_deploy.models.encoders import ENCODERS
from restyle_deploy.models.generator import ConstantInput, FirFilter, Generator, ModulatedConv2d, StyledConv, ToRGB
from restyle_deploy.models.layers import EqualLinear
from restyle_deploy.models.restyle import RestyleModel
from restyle_deploy.runtime.session import InversionResult, targets_from_images

Array = NDArray[Any]
Module = TypeVar("Module", bound=nn.Module)

# The demodulation's energies are sums of squares that the exporter folded; they follow from the weights.
ENERGY_TOLERANCE = 1e-4


def model_from_bundle(bundle: Bundle) -> RestyleModel:
    """Rebuild the torch model from the exported graphs, in evaluation mode.

    The mapping network is not in the graphs, and so not in the model. One graph is in memory at a time, twice: as the
    file has it and as weights.

    Args:
        bundle: an opened bundle; only its exported graphs and its average latent are read.
    Raises:
        BundleError: an unknown encoder type; a node or a weight that is missing, of another shape, or of no layer. All
            of a graph's problems are named.
    """
    if bundle.config.encoder_type not in ENCODERS:
        raise BundleError(
            f"{bundle.path}: encoder_type is {bundle.config.encoder_type!r}, expected one of {', '.join(ENCODERS)}"
        )
    with torch.device("meta"):
        model = RestyleModel(replace(bundle.config, mapping_layers=0))
    weights: dict[str, Tensor] = {}
    for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        reader = _GraphReader(bundle.graphs["generator" if name == "decoder" else name])
        weights |= _read_weights(reader, part, name)
    model.load_state_dict(weights, strict=True, assign=True)
    model.latent_avg = torch.from_numpy(bundle.latent_avg.copy())
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def invert_with_model(
    model: RestyleModel, images: Array, *, average_image: NDArray[np.float32], steps: int, every_step: bool = False
) -> InversionResult:
    """Run the torch model as `Session.invert` runs the graphs: from the stored average, to arrays of the caller's.

    Args:
        model: in evaluation mode.
        images: as for `Session.invert`, in one batch.
        average_image: [3, H, W] float32, the bundle's.
        steps: refinement steps, at least 1.
        every_step: keep each step: a leading steps axis on both results.
    Raises:
        TypeError, ShapeError, ValueError: see `Session.invert`.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    target = torch.from_numpy(targets_from_images(images, model.config))
    current = torch.from_numpy(average_image.copy()).expand_as(target)
    latent = model.latent_avg.expand(len(target), -1, -1)
    kept: list[tuple[Array, Array]] = []
    for _ in range(steps):
        result = model.run_step(target, current, latent)
        current, latent = result.current, result.latent
        if every_step:
            kept.append((result.image.numpy(), result.latent.numpy()))
    if not every_step:
        return InversionResult(
            images=result.image.numpy(), latents=result.latent.numpy(), current=result.current.numpy()
        )
    images, latents = (np.stack(arrays) for arrays in zip(*kept, strict=True))
    return InversionResult(images=images, latents=latents, current=result.current.numpy())


class _GraphReader:
    """The nodes of a graph by the module they come from, and the constants that they take.

    Attributes:
        problems: what is missing; no reading stops at the first.
    """

    def __init__(self, graph: GraphRecord) -> None:
        self._path = graph.path
        content = onnx.load(graph.path).graph
        self._constants = {tensor.name: tensor for tensor in content.initializer}
        self._nodes: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in content.node:
            self._nodes[node.name.partition("/")[0]].append(node)
        self._taken: set[str] = set()
        self.problems: list[str] = []

    def has(self, path: str, op_type: str, constants: int | None = None) -> bool:
        """Whether the module at `path` has a node of this type, with so many constants where that matters."""
        return any(
            node.op_type == op_type and constants in (None, len(self._constants_of(node)))
            for node in self._nodes.get(path, ())
        )

    def take(self, path: str, op_type: str, shapes: list[tuple[int, ...]]) -> list[Array]:
        """Return the constants of the one node of this type at `path` that has as many.

        A missing node or a constant of another shape is noted as a problem, and a constant of one element returned in
        its place.
        """
        found = [
            node
            for node in self._nodes.get(path, ())
            if node.op_type == op_type and len(self._constants_of(node)) == len(shapes)
        ]
        if len(found) != 1:
            self.problems.append(f"{path} has {len(found)} nodes {op_type} with {len(shapes)} constants, expected 1")
            return [np.ones((), np.float32)] * len(shapes)
        self._taken.add(found[0].name)
        arrays = [onnx.numpy_helper.to_array(tensor) for tensor in self._constants_of(found[0])]
        for array, shape in zip(arrays, shapes, strict=True):
            if array.shape != shape or array.dtype != np.float32:
                self.problems.append(
                    f"{found[0].name} has a constant {array.dtype} {list(array.shape)}, expected float32 {list(shape)}"
                )
        return arrays

    def check(self) -> None:
        """Raise `BundleError` with all problems: what is missing, and weights that were not taken."""
        for nodes in self._nodes.values():
            for node in nodes:
                tensors = self._constants_of(node)
                is_weight = any(
                    tensor.data_type == onnx.TensorProto.FLOAT and math.prod(tensor.dims) > 1 for tensor in tensors
                )
                if is_weight and node.name not in self._taken:
                    self.problems.append(f"{node.name} ({node.op_type}) belongs to no layer of the model")
        if self.problems:
            raise BundleError(
                f"{self._path}: not a graph that the export makes of this model: {'; '.join(self.problems)}; "
                "export the bundle again"
            )

    def _constants_of(self, node: onnx.NodeProto) -> list[onnx.TensorProto]:
        return [self._constants[name] for name in node.input if name in self._constants]


def _read_weights(reader: _GraphReader, part: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the state dict of the model's part called `name`."""
    batch_norms = _batch_norms_after_convolutions(part, name)
    weights: dict[str, Tensor] = {}
    for path, module in part.named_modules(prefix=name):
        arrays: Mapping[str, Array] = {}
        if isinstance(module, nn.Conv2d):
            arrays = _read_convolution(reader, path, module, batch_norms.get(path))
        elif type(module) in _READERS:
            arrays = _READERS[type(module)](reader, path, module)
        # Copied at once: the arrays are views of the file's bytes.
        weights |= {key: torch.from_numpy(np.array(array, order="C")) for key, array in arrays.items()}
    reader.check()
    return weights


def _batch_norms_after_convolutions(part: nn.Module, name: str) -> dict[str, str]:
    """Return the paths of the batch norms that follow a convolution, by the convolution's path."""
    leaves = [(path, module) for path, module in part.named_modules(prefix=name) if not any(module.children())]
    return {
        path: next_path
        for (path, module), (next_path, following) in pairwise(leaves)
        if isinstance(module, nn.Conv2d) and isinstance(following, nn.BatchNorm2d)
    }


def _read_convolution(
    reader: _GraphReader, path: str, module: nn.Conv2d, batch_norm: str | None
) -> Mapping[str, Array]:
    """Read a convolution, which stands under the name of its batch norm where that went into it."""
    shape, bias_shape = tuple(module.weight.shape), (module.out_channels,)
    if module.bias is not None:
        weight, bias = reader.take(path, "Conv", [shape, bias_shape])
        return {f"{path}.weight": weight, f"{path}.bias": bias}
    if batch_norm is not None and not reader.has(batch_norm, "BatchNormalization"):
        weight, bias = reader.take(batch_norm, "Conv", [shape, bias_shape])
        return {f"{path}.weight": weight, f"{batch_norm}.bias": bias}
    (weight,) = reader.take(path, "Conv", [shape])
    return {f"{path}.weight": weight}


def _read_batch_norm(reader: _GraphReader, path: str, module: nn.BatchNorm2d) -> Mapping[str, Array]:
    """Read a batch norm; of one that went into the convolution before it, all but the bias, which is read there."""
    size, shape = module.num_features, (module.num_features,)
    batches = {f"{path}.num_batches_tracked": np.zeros((), np.int64)}
    if not reader.has(path, "BatchNormalization"):
        scale, mean = np.ones(size, np.float32), np.zeros(size, np.float32)
        variance = np.full(size, 1 - module.eps, np.float32)  # with epsilon it makes 1
        return {f"{path}.weight": scale, f"{path}.running_mean": mean, f"{path}.running_var": variance, **batches}
    names = ("weight", "bias", "running_mean", "running_var")
    arrays = reader.take(path, "BatchNormalization", [shape] * len(names))
    return {f"{path}.{name}": array for name, array in zip(names, arrays, strict=True)} | batches


def _read_prelu(reader: _GraphReader, path: str, module: nn.PReLU) -> Mapping[str, Array]:
    (slopes,) = reader.take(path, "PRelu", [(1, module.num_parameters, 1, 1)])
    return {f"{path}.weight": slopes.reshape(-1)}


def _read_linear(reader: _GraphReader, path: str, module: EqualLinear) -> Mapping[str, Array]:
    weight, bias = reader.take(path, "Gemm", [tuple(module.weight.shape), tuple(module.bias.shape)])
    return {f"{path}.weight": weight / np.float32(module.scale), f"{path}.bias": bias / np.float32(module.lr_mul)}


def _read_modulated_convolution(reader: _GraphReader, path: str, module: ModulatedConv2d) -> Mapping[str, Array]:
    out_channels, in_channels, *kernel = module.weight.shape[1:]
    if module.upsample:
        (weight,) = reader.take(path, "ConvTranspose", [(in_channels, out_channels, *kernel)])
        weight = weight.swapaxes(0, 1) if weight.ndim == 4 else weight
    else:
        (weight,) = reader.take(path, "Conv", [(out_channels, in_channels, *kernel)])  # [O, I, k, k]
    if module.demodulate:
        # Epsilon is the bias of the linear layer, or in former exports was added after it.
        epsilon_shapes = [(out_channels,)] if reader.has(path, "Gemm", constants=2) else []
        energy, *_ = reader.take(path, "Gemm", [(out_channels, in_channels), *epsilon_shapes])
        expected = np.square(weight).sum(axis=(2, 3)) if weight.ndim == 4 else energy
        if energy.shape == expected.shape and not np.allclose(energy, expected, rtol=ENERGY_TOLERANCE, atol=0):
            reader.problems.append(f"{path}: the demodulation does not fit the weight")
    return {f"{path}.weight": weight[None] / np.float32(module.scale)}


def _read_styled_convolution(reader: _GraphReader, path: str, module: StyledConv) -> Mapping[str, Array]:
    (bias,) = reader.take(path, "FusedBiasAct", [tuple(module.activate.bias.shape)])
    return {f"{path}.activate.bias": bias, f"{path}.noise.weight": np.ones(1, np.float32)}


def _read_to_rgb(reader: _GraphReader, path: str, module: ToRGB) -> Mapping[str, Array]:
    (bias,) = reader.take(path, "Add", [tuple(module.bias.shape)])
    return {f"{path}.bias": bias}


def _read_fir_filter(reader: _GraphReader, path: str, module: FirFilter) -> Mapping[str, Array]:
    (kernel,) = reader.take(path.rpartition(".")[0], "UpFirDn2d", [tuple(module.kernel.shape)])
    return {f"{path}.kernel": kernel}


def _read_constant_input(reader: _GraphReader, path: str, module: ConstantInput) -> Mapping[str, Array]:
    """Read the first map, which the first convolution's style multiplies."""
    (constant,) = reader.take(f"{path.rpartition('.')[0]}.conv1.conv", "Mul", [tuple(module.input.shape)])
    return {f"{path}.input": constant}


def _read_noises(reader: _GraphReader, path: str, module: Generator) -> Mapping[str, Array]:
    """Read each layer's noise times its strength, and keep it as the noise; the strength is 1 then."""
    layers = ["conv1", *(f"convs.{index}" for index in range(len(module.convs)))]
    return {
        f"{path}.noises.noise_{index}": reader.take(f"{path}.{layer}", "Add", [tuple(noise.shape)])[0]
        for index, (layer, noise) in enumerate(zip(layers, module.noises.buffers(), strict=True))
    }


_READERS: Mapping[type[nn.Module], Callable[[_GraphReader, str, Any], Mapping[str, Array]]] = {
    nn.BatchNorm2d: _read_batch_norm,
    nn.PReLU: _read_prelu,
    EqualLinear: _read_linear,
    ModulatedConv2d: _read_modulated_convolution,
    StyledConv: _read_styled_convolution,
    ToRGB: _read_to_rgb,
    FirFilter: _read_fir_filter,
    ConstantInput: _read_constant_input,
    Generator: _read_noises,
}
