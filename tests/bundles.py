"""Bundles that are changed after the export, with hashes that fit again or not."""

import hashlib
import io
import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends import load_backend
from restyle_deploy.bundle import MANIFEST, EngineRecord, GraphRecord, read_bundle, write_engine
from restyle_deploy.engines import TARGET_FEATURES, engine_directory
from restyle_deploy.files import sha256_of_file
from restyle_deploy.model_config import ModelConfig, graph_specs
from restyle_deploy.processor import describe_processor
from restyle_deploy.tensors import BATCH, TensorSpec

PLAN: dict[str, Any] = {
    "origin": "tuned",
    "choices": {"generator.up.64": "polyphase", "encoder.input": "split"},
    "measurements": {"generator.up.64": {"polyphase": 1.25, "transposed": 2.5}},
    "seconds": 3.5,
}


def edit_manifest(bundle: Path, change: Callable[[Any], object]) -> None:
    """Let `change` edit the manifest in place."""
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Replace a file and its hash: no hash shows that something is wrong with it."""
    (bundle / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()

    def change(manifest: Any) -> None:
        for record in (*manifest["graphs"].values(), *manifest["arrays"].values()):
            if record["file"] == name:
                record["sha256"] = digest

    edit_manifest(bundle, change)


def replace_array(bundle: Path, name: str, array: NDArray[Any]) -> None:
    """Replace a `.npy` file and its hash."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    replace_file(bundle, name, buffer.getvalue())


def replace_arrays(bundle: Path, name: str, arrays: dict[str, NDArray[Any]]) -> None:
    """Replace a `.npz` file and its hash."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    replace_file(bundle, name, buffer.getvalue())


def borders_of_engine(
    config: ModelConfig, roles: Collection[str], *, batch: int | None = None
) -> dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]:
    """Return (inputs, outputs) of the graphs of an engine with these roles."""
    (target, current, latent), encoded = graph_specs(config)["encoder"]
    features = replace(target, name=TARGET_FEATURES, shape=(BATCH, 2, 4, 5))
    borders = {
        "target": ((target,), (features,)),
        "encoder": ((features if "target" in roles else target, current, latent), encoded),
        "generator": graph_specs(config)["generator"],
        "preview": ((latent,), (current,)),
    }

    def sized(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(spec, shape=(BATCH if batch is None else batch, *spec.shape[1:])) for spec in specs)

    return {role: (sized(borders[role][0]), sized(borders[role][1])) for role in borders if role in roles}


def add_engine(directory: Path, *, roles: tuple[str, ...] = (), **changes: Any) -> EngineRecord:
    """Add an engine to a bundle and return its record: the exported graphs, and no more than a name for other `roles`.

    It is for ONNX Runtime on this machine; `changes` are other values of the record.
    """
    bundle = read_bundle(directory)
    key = {name: changes.pop(name, value) for name, value in (("backend", "onnxruntime"), ("precision", "fp32"))}
    folder = engine_directory(directory, **key, device="cpu")
    folder.mkdir(parents=True)
    batch = changes.get("batch")
    graphs: dict[str, GraphRecord] = {}
    files: dict[str, str] = {}
    for role, (inputs, outputs) in borders_of_engine(
        bundle.config, ("encoder", "generator", *roles), batch=batch
    ).items():
        path = folder / f"{role}.onnx"
        path.write_bytes(bundle.graphs[role].path.read_bytes() if role in bundle.graphs else role.encode())
        (folder / f"{role}.onnx.data").write_bytes(b"weights")
        files |= {path.name: sha256_of_file(path), f"{role}.onnx.data": hashlib.sha256(b"weights").hexdigest()}
        graphs[role] = GraphRecord(path=path, sha256=files[path.name], inputs=inputs, outputs=outputs)
    record = EngineRecord(
        **key,
        device="cpu",
        directory=folder,
        graphs=graphs,
        files=files,
        **{
            "library_versions": load_backend("onnxruntime").library_versions(),
            "processor": describe_processor(),
            "sources": {name: graph.sha256 for name, graph in bundle.graphs.items()},
            "batch": None,
            "plan": PLAN,
            "build": {"verified": True, "reason": None},
            **changes,
        },
    )
    write_engine(directory, record)
    return record
