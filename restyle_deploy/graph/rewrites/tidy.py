"""What follows every rewrite: constants folded, nothing unused left, each weight once in the file."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    DeduplicateHashedInitializersPass,
    IdentityEliminationPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    TopologicalSortPass,
)
from onnxscript.optimizer import fold_constants

# Constants of any size are folded: what is computed from weights alone is computed once.
FOLDING_LIMIT = 2**31


def tidy(model: ir.Model) -> ir.Model:
    """Fold constants, and remove unused nodes, functions and initialisers and second copies of an initialiser."""
    fold_constants(model, input_size_limit=FOLDING_LIMIT, output_size_limit=FOLDING_LIMIT)
    _make_contiguous(model)
    for change in (
        IdentityEliminationPass(),
        RemoveUnusedNodesPass(),
        RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        DeduplicateHashedInitializersPass(),
        TopologicalSortPass(),
    ):
        change(model)
    return model


def _make_contiguous(model: ir.Model) -> None:
    """Copy the constants that folding left as transposed views, which the search for copies cannot read."""
    for value in model.graph.initializers.values():
        array = value.const_value.numpy() if value.const_value is not None else None
        if array is not None and not array.flags.c_contiguous:
            value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
