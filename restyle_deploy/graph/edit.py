"""Reading and changing graphs in place; what all rewrites share."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[np.float32]
Attribute = int | float | str | Sequence[int] | Sequence[float]


class Edit:
    """New nodes in front of an existing one, named after its layer: `<module path>/<rewrite>_<number>`."""

    def __init__(self, model: ir.Model, anchor: ir.Node, rewrite: str) -> None:
        self._graph = model.graph
        self._anchor = anchor
        self._name = f"{layer_of(anchor)}/{rewrite}"
        self._taken = {node.name for node in self._graph} | set(self._graph.initializers)
        self._count = 0

    def constant(self, array: Array | NDArray[np.int64]) -> ir.Value:
        """Add an initialiser."""
        name = self._next_name()
        value = ir.Value(name=name, const_value=ir.tensor(np.asarray(array, order="C"), name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        self._graph.register_initializer(value)
        return value

    def integers(self, *values: int) -> ir.Value:
        """Add an int64 initialiser of one axis."""
        return self.constant(np.array(values, np.int64))

    def add(self, op_type: str, *inputs: ir.Value, **attributes: Attribute) -> ir.Value:
        """Insert a node of a standard operator and return its one output."""
        name = self._next_name()
        node = ir.node(op_type, inputs, attributes=attributes, name=name)
        node.outputs[0].name = name
        self._graph.insert_before(self._anchor, node)
        return node.outputs[0]

    def _next_name(self) -> str:
        while (name := f"{self._name}_{self._count}") in self._taken:
            self._count += 1
        self._taken.add(name)
        return name


def layer_of(node: ir.Node) -> str:
    """Return the module path that a node's name begins with: `encoder.body.3` of `encoder.body.3/Conv_12`."""
    return (node.name or "").partition("/")[0]


def array_of(value: ir.Value | None) -> NDArray[np.generic] | None:
    """Return a constant's content, None for what is computed or fed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def sizes_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the sizes after the batch axis, None where any of them is unknown."""
    if value is None or value.shape is None or value.shape.rank() < 1:
        return None
    sizes = tuple(value.shape)[1:]
    return tuple(size for size in sizes if isinstance(size, int)) if all(isinstance(s, int) for s in sizes) else None


def integers_of(node: ir.Node, name: str, default: Sequence[int] = ()) -> tuple[int, ...]:
    """Return a list attribute of a node."""
    attribute = node.attributes.get(name)
    return tuple(attribute.as_ints()) if attribute is not None else tuple(default)


def integer_of(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute of a node."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def has_explicit_pads(node: ir.Node) -> bool:
    """Whether a convolution's padding is what `pads` says, not left to the runtime."""
    attribute = node.attributes.get("auto_pad")
    return attribute is None or attribute.as_string() == "NOTSET"


def window_of(convolution: ir.Node) -> dict[str, tuple[int, ...]]:
    """Return the attributes that say which inputs an output of a convolution reads, those that are given."""
    names = ("pads", "strides", "dilations", "kernel_shape")
    return {name: integers_of(convolution, name) for name in names if name in convolution.attributes}


def only_user(value: ir.Value) -> ir.Node | None:
    """Return the node that alone reads a value, None where there are several or it is an output of the graph."""
    users = {use.node for use in value.uses()}
    return next(iter(users)) if len(users) == 1 and not value.is_graph_output() else None


def nodes_of_type(model: ir.Model, op_type: str, layers: Iterable[str] | None = None) -> Iterator[ir.Node]:
    """Yield the nodes of an operator, of the named layers or of all; the graph may be changed meanwhile."""
    wanted = None if layers is None else set(layers)
    for node in tuple(model.graph):
        if node.op_type == op_type and (wanted is None or layer_of(node) in wanted):
            yield node


def fix_batch(model: ir.Model, batch: int | None) -> ir.Model:
    """Set the free first axis of all values to `batch`; None leaves it free."""
    values = (*model.graph.inputs, *(output for node in model.graph for output in node.outputs))
    for value in values if batch is not None else ():
        if value.shape is not None and value.shape.rank() > 0 and not isinstance(value.shape[0], int):
            value.shape = ir.Shape((batch, *tuple(value.shape)[1:]))
    return model


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let all users of `old` read `new`, which takes its name, type and shape; `old`'s node is then without use."""
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    name, old.name = old.name, None
    new.name = name
