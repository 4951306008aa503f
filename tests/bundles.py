"""Bundles that are changed after the export, with hashes that fit again or not."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bundle import MANIFEST


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
