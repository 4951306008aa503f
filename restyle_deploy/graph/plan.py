"""Which rewrite each site of a graph gets: the families of choices, and the plan of a machine nobody measured on."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import onnx_ir as ir

from restyle_deploy.graph.edit import array_of, integers_of, layer_of, nodes_of_type, only_user, sizes_of
from restyle_deploy.graph.rewrites.constant_weights import constant_weights
from restyle_deploy.graph.rewrites.depthwise_filter import depthwise_filter, separable_filter
from restyle_deploy.graph.rewrites.fold_batchnorm import fold_batchnorm
from restyle_deploy.graph.rewrites.fuse_epilogue import fuse_epilogue
from restyle_deploy.graph.rewrites.leading_batchnorm import leading_batchnorm
from restyle_deploy.graph.rewrites.merge_heads import find_heads, merge_heads
from restyle_deploy.graph.rewrites.merged_upsampling import merged_upsampling
from restyle_deploy.graph.rewrites.phase_upsampling import phase_upsampling
from restyle_deploy.graph.rewrites.polyphase_upsampling import polyphase_upsampling
from restyle_deploy.graph.rewrites.scale_constants import scale_constants
from restyle_deploy.graph.rewrites.skip_upsample import skip_upsample
from restyle_deploy.graph.rewrites.target_features import first_convolution, target_graph, target_once
from restyle_deploy.graph.rewrites.tidy import tidy
from restyle_deploy.graph.rewrites.upsampling_convolution import find_upsampling_convolutions
from restyle_deploy.graph.rewrites.winograd import can_tile, winograd

# Where Winograd may pay: with fewer channels, on larger and on tiny images its transforms cost more than they save.
WINOGRAD_CHANNELS = 128
WINOGRAD_LEAST_PIXELS, WINOGRAD_MOST_PIXELS = 16 * 16, 256 * 256

# The choice of a graph that a plan would not make faster: no rewrite at all.
AS_EXPORTED = "as exported"

Choices = Mapping[str, str]
"""Site -> choice."""
Rewrite = Callable[..., ir.Model]
"""`(model, *, layers: Collection[str])`: changes the layers in place and returns the model."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in a graph that can be computed in several ways.

    Attributes:
        family: a key of `FAMILIES`.
        layer: module path.
        shape: what its speed depends on; sites of one family and shape are measured once.
        inputs, outputs: names of the values at its border.
        work: a rough number of operations, to measure the heaviest first.
    """

    family: str
    layer: str
    shape: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    work: float

    @property
    def name(self) -> str:
        """Layer and family, unique in a bundle."""
        return f"{self.layer} {self.family}"

    @property
    def key(self) -> str:
        """Family and shape."""
        return f"{self.family} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Ways to compute one kind of site.

    Attributes:
        find: returns the sites of an exported graph.
        exported: the choice that leaves the graph as it was exported.
        rewrites: the other choices.
        float32_only: choices that amplify rounding too much for a shorter precision.
        least_gain: by choice, the share of time that it must save before it replaces the table's; for others
            `planner.LEAST_GAIN`.
    """

    find: Callable[[ir.Model], Iterable[Site]]
    exported: str
    rewrites: Mapping[str, Rewrite]
    float32_only: frozenset[str] = frozenset()
    least_gain: Mapping[str, float] = field(default_factory=dict)

    def choices_for(self, precision: str) -> tuple[str, ...]:
        """Return the choices that keep a precision, the exported one first."""
        return tuple(choice for choice in self.choices if precision == "fp32" or choice not in self.float32_only)

    @property
    def choices(self) -> tuple[str, ...]:
        """All choices, the exported one first."""
        return (self.exported, *self.rewrites)


def _upsampling_sites(model: ir.Model) -> Iterable[Site]:
    for found in find_upsampling_convolutions(model):
        yield _site("upsampling", found.filter, [found.x], [found.filter.outputs[0]], found.weight.shape[:2])


def _skip_sites(model: ir.Model) -> Iterable[Site]:
    for node in nodes_of_type(model, "UpFirDn2d"):
        if integers_of(node, "up") != (1, 1) and array_of(node.inputs[1]) is not None:
            yield _site("skip", node, [node.inputs[0]], [node.outputs[0]], (1, 1))


def _convolution_sites(model: ir.Model) -> Iterable[Site]:
    for node in nodes_of_type(model, "Conv"):
        weight = array_of(node.inputs[1])
        sizes = sizes_of(node.inputs[0])
        if weight is None or sizes is None or not can_tile(node):
            continue
        fits = WINOGRAD_LEAST_PIXELS <= sizes[1] * sizes[2] <= WINOGRAD_MOST_PIXELS
        if min(weight.shape[:2]) >= WINOGRAD_CHANNELS and fits:
            yield _site("convolution", node, [node.inputs[0]], [node.outputs[0]], weight.shape[:2])


def _batchnorm_sites(model: ir.Model) -> Iterable[Site]:
    for node in nodes_of_type(model, "BatchNormalization"):
        convolution = only_user(node.outputs[0])
        weight = array_of(convolution.inputs[1]) if convolution is not None and convolution.op_type == "Conv" else None
        if convolution is not None and weight is not None:
            channels = weight.shape[1], weight.shape[0]
            yield _site("batchnorm", node, [node.inputs[0]], [convolution.outputs[0]], channels)


def _head_sites(model: ir.Model) -> Iterable[Site]:
    heads = find_heads(model)
    if len(heads) > 1:
        inputs = list(dict.fromkeys(head.x for head in heads))
        outputs = [head.linear.outputs[0] for head in heads]
        shape = f"{len(heads)} heads on {', '.join(_format_sizes(value) for value in inputs)}"
        names = tuple(tuple(value.name or "" for value in values) for values in (inputs, outputs))
        work = 64.0 * sum(head.weight_count for head in heads)
        yield Site(family="heads", layer=heads[0].layer, shape=shape, inputs=names[0], outputs=names[1], work=work)


def _target_sites(model: ir.Model) -> Iterable[Site]:
    found = first_convolution(model)
    if found is not None:
        inputs = [found.target, found.current]
        yield _site("target", found.convolution, inputs, [found.convolution.outputs[0]], found.weight.shape[:2])


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "upsampling": Family(
            find=_upsampling_sites,
            exported="node",
            rewrites={
                "depthwise": depthwise_filter,
                "separable": separable_filter,
                "phases": phase_upsampling,
                "polyphase": polyphase_upsampling,
                "merged": merged_upsampling,
            },
        ),
        "skip": Family(
            find=_skip_sites,
            exported="node",
            rewrites={"transposed": skip_upsample},
        ),
        "batchnorm": Family(
            find=_batchnorm_sites,
            exported="kept",
            rewrites={"folded": leading_batchnorm},
        ),
        "heads": Family(
            find=_head_sites,
            exported="separate",
            rewrites={"merged": merge_heads},
        ),
        "convolution": Family(
            find=_convolution_sites,
            exported="direct",
            rewrites={"winograd": winograd},
            float32_only=frozenset({"winograd"}),  # its transforms have factors up to 8 and 1/24
            least_gain=MappingProxyType({"winograd": 0.15}),  # its weights take four times the memory
        ),
        "target": Family(find=_target_sites, exported="every step", rewrites={"once": target_once}),
    }
)

# For CPUs, what measured fastest at most shapes: two cores with AVX2, ONNX Runtime 1.32 and OpenVINO 2026.4. For GPUs,
# what reads and writes least; "node" is our kernel there, which TensorRT for RTX does not take.
TABLE: Mapping[str, Choices] = MappingProxyType(
    {
        "onnxruntime": {
            "upsampling": "depthwise",
            "skip": "transposed",
            "batchnorm": "kept",
            "heads": "merged",
            "convolution": "direct",
            "target": "once",
        },
        "openvino": {
            "upsampling": "separable",
            "skip": "transposed",
            "batchnorm": "kept",
            "heads": "merged",
            "convolution": "winograd",
            "target": "every step",
        },
        "pytorch": {
            "upsampling": "node",
            "skip": "node",
            "batchnorm": "kept",
            "heads": "merged",
            "convolution": "direct",
            "target": "every step",
        },
        "tensorrt": {
            "upsampling": "node",
            "skip": "node",
            "batchnorm": "kept",
            "heads": "merged",
            "convolution": "direct",
            "target": "every step",
        },
        "tensorrt-rtx": {
            "upsampling": "polyphase",
            "skip": "transposed",
            "batchnorm": "kept",
            "heads": "merged",
            "convolution": "direct",
            "target": "every step",
        },
    }
)

# In another precision. TensorRT finds no way to compute a transposed convolution of bfloat16 maps (NVIDIA/TensorRT,
# issue 4829; measured: TensorRT for RTX 1.7.1), which leaves "phases" and "polyphase".
_EXCEPTIONS: Mapping[tuple[str, str], Choices] = MappingProxyType({("tensorrt", "bf16"): {"upsampling": "polyphase"}})


def table_of(backend: str, precision: str) -> Choices:
    """Return what a backend takes where nothing was measured: a choice for each family."""
    return {**TABLE[backend], **_EXCEPTIONS.get((backend, precision), {})}


def find_sites(model: ir.Model) -> list[Site]:
    """Return all sites of an exported graph."""
    return [site for family in FAMILIES.values() for site in family.find(model)]


def apply_choices(
    model: ir.Model, sites: Iterable[Site], choices: Choices, *, epilogues: bool = False
) -> ir.Model | None:
    """Rewrite an exported graph by a plan, and tidy it.

    Beside what the plan chooses, constant weights, folded normalisations and scaled constants are for all: they take
    work away and add none.

    Args:
        model: changed in place.
        sites: of this graph.
        choices: by `Site.name`; a site that is not named stays as it was exported.
        epilogues: leave what follows a convolution to one node each instead of scaling its constants; for backends with
            our kernels, and before a graph is typed to float16, whose range these nodes do not depend on.
    Returns:
        The graph that runs once per image and gives the encoder's target features, where the plan wants them.
    """
    constant_weights(model)
    fold_batchnorm(model)
    if not epilogues:
        scale_constants(model)
    layers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for site in sites:
        layers[site.family, choices.get(site.name, FAMILIES[site.family].exported)].append(site.layer)
    target = target_graph(model) if layers["target", "once"] else None
    for name, family in FAMILIES.items():
        for choice, rewrite in family.rewrites.items():
            if layers[name, choice]:
                rewrite(model, layers=layers[name, choice])
    if epilogues:
        fuse_epilogue(model)  # behind the filters that are left
    tidy(model)
    return target


def _site(
    family: str,
    node: ir.Node,
    inputs: Sequence[ir.Value | None],
    outputs: Sequence[ir.Value],
    channels: tuple[int, ...],
) -> Site:
    """Return a site whose last node is `node`, or whose layer is."""
    read, written = (tuple(value.name or "" for value in values if value is not None) for values in (inputs, outputs))
    sizes = sizes_of(outputs[0]) or ()
    work = float(channels[0] * channels[1])
    for size in sizes[1:]:
        work *= size
    shape = f"{'→'.join(map(str, channels))} to {_format_sizes(outputs[0])}"
    return Site(family=family, layer=layer_of(node), shape=shape, inputs=read, outputs=written, work=work)


def _format_sizes(value: ir.Value) -> str:
    return "×".join(map(str, sizes_of(value) or ("?",)))
