"""Exact rewrites, one per file: the same function in other arithmetic.

Each is a function from graph to graph. It changes the `onnx_ir.Model` that it is given, in place, and returns it;
where nothing fits, nothing changes. `layers` limits it to layers of these module paths. Results differ from the former
ones by rounding only: at most 1e-4 of the tensor's range.
"""
