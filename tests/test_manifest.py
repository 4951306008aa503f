import hashlib
from pathlib import Path
from typing import Any

import pytest

from restyle_deploy.errors import BundleError
from restyle_deploy.manifest import check_hashes, path_inside, specs_from_json, texts_from_json, typed
from restyle_deploy.tensors import TensorSpec


def test_values_of_another_type_are_named() -> None:
    assert typed({"a": 1}, "a", int) == 1
    with pytest.raises(TypeError, match="a is '1', expected int"):
        typed({"a": "1"}, "a", int)
    with pytest.raises(KeyError, match="b"):
        typed({"a": 1}, "b", int)
    with pytest.raises(TypeError, match=r"a\.b is None, expected str"):
        texts_from_json({"a": {"b": None}}, "a")


def test_specs_are_read() -> None:
    record = {"inputs": [{"name": "x", "dtype": "float32", "shape": ["N", 3]}]}
    assert specs_from_json(record, "inputs") == (TensorSpec(name="x", dtype="float32", shape=("N", 3)),)


@pytest.mark.parametrize("shape", [None, "N", 3, [None], [1.0], [True], [[1]]])
def test_shapes_that_are_none_are_refused(shape: Any) -> None:
    with pytest.raises(TypeError, match="shape is "):
        specs_from_json({"inputs": [{"name": "x", "dtype": "float32", "shape": shape}]}, "inputs")


def test_paths_stay_inside(tmp_path: Path) -> None:
    assert path_inside(tmp_path, "a/../b", of="bundle") == tmp_path / "a/../b"
    assert path_inside(tmp_path, "a/b", of="bundle", within=tmp_path / "a") == tmp_path / "a/b"
    for name in ("..", "../b", str(tmp_path.parent)):
        with pytest.raises(BundleError, match="lies outside the bundle"):
            path_inside(tmp_path, name, of="bundle")
    for name in ("b", "a", "a/..", "a/../b"):
        with pytest.raises(BundleError, match="lies outside the bundle"):
            path_inside(tmp_path, name, of="bundle", within=tmp_path / "a")


def test_first_file_that_is_not_as_it_was_is_named(tmp_path: Path) -> None:
    expected = {}
    for index in range(20):
        path = tmp_path / f"{index:02}"
        path.write_bytes(bytes([index]) * index)
        expected[path] = hashlib.sha256(bytes([index]) * index).hexdigest()
    check_hashes(expected, since="build", mend="build it again")
    check_hashes({}, since="build", mend="build it again")
    for name in ("17", "04"):
        (tmp_path / name).write_bytes(b"changed")
        with pytest.raises(BundleError, match=f"{name}: changed since the build .*; build it again$"):
            check_hashes(expected, since="build", mend="build it again")
    (tmp_path / "18").unlink()
    with pytest.raises(BundleError, match="18: missing; build it again$"):
        check_hashes(expected, since="build", mend="build it again")
