import hashlib
from pathlib import Path
from typing import Any

import pytest

from restyle_deploy.errors import BundleError
from restyle_deploy.manifest import (
    check_hashes,
    find_changes,
    path_inside,
    read_json,
    specs_from_json,
    texts_from_json,
    typed,
)
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


def test_all_files_that_are_not_as_they_were_are_found(tmp_path: Path) -> None:
    expected = {}
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode())
        expected[tmp_path / name] = hashlib.sha256(name.encode()).hexdigest()
    assert find_changes(expected) == {}
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "c").unlink()
    assert find_changes(expected) == {tmp_path / "a": hashlib.sha256(b"").hexdigest(), tmp_path / "c": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 200 + "]" * 200, "nested too deeply"),
        ('{"a": ' * 200 + "1" + "}" * 200, "nested too deeply"),
    ],
    ids=["no JSON", "endless", "lists", "objects"],
)
def test_content_that_nobody_could_walk_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


def test_content_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [{"b": [1, null]}]}')
    assert read_json(tmp_path / "a.json") == {"a": [{"b": [1, None]}]}
