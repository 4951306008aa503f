"""Records of engines: written, read again, and refused when they are damaged."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from restyle_deploy.bundle import (
    MANIFEST,
    EngineRecord,
    check_engine,
    check_engine_files,
    find_engine,
    read_bundle,
    write_engine,
)
from restyle_deploy.engines import (
    ENGINES,
    build_command,
    engine_as_json,
    engine_directory,
    join_processors,
    quote_path,
)
from restyle_deploy.errors import BundleError
from tests.bundles import PLAN, add_engine, edit_manifest

ROLES = ("target", "preview")


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to change."""
    return shutil.copytree(toy_bundle, tmp_path / "bundle")


def facts_of(engine: EngineRecord) -> dict[str, Any]:
    """Return the fields in types that can be compared."""
    values = {field.name: getattr(engine, field.name) for field in fields(engine)}
    return {name: dict(value) if hasattr(value, "items") else value for name, value in values.items()}


# Written and read


@pytest.mark.parametrize("roles", [(), ("target",), ("preview",), ROLES], ids=lambda roles: "+".join(roles) or "none")
@pytest.mark.parametrize("batch", [None, 1])
def test_engine_is_read_as_it_was_written(bundle: Path, roles: tuple[str, ...], batch: int | None) -> None:
    written = add_engine(bundle, roles=roles, batch=batch)
    (read,) = read_bundle(bundle).engines
    assert facts_of(read) == facts_of(written)
    assert set(read.graphs) == {"encoder", "generator", *roles}
    assert not list(bundle.glob(".*"))  # nothing temporary stays


def test_plan_may_hold_more(bundle: Path) -> None:
    plan = {**PLAN, "origin": "table", "measurements": {}, "seconds": 0, "settings": {"threads": 2}}
    add_engine(bundle, plan=plan)
    assert read_bundle(bundle).engines[0].plan == plan


def test_engine_replaces_the_one_for_the_same(bundle: Path) -> None:
    first, other = add_engine(bundle), add_engine(bundle, precision="bf16")
    write_engine(bundle, replace(first, processor="Abacus"))
    opened = read_bundle(bundle)
    assert [(engine.precision, engine.processor) for engine in opened.engines] == [
        ("bf16", other.processor),
        ("fp32", "Abacus"),
    ]


def test_engine_is_found_by_backend_device_and_precision(bundle: Path) -> None:
    assert find_engine(read_bundle(bundle), backend="onnxruntime", device="cpu", precision="fp32") is None
    add_engine(bundle)
    add_engine(bundle, backend="openvino", precision="bf16")
    opened = read_bundle(bundle)
    found = find_engine(opened, backend="openvino", device="cpu", precision="bf16")
    assert found is not None
    assert found.key == ("openvino", "cpu", "bf16")
    for key in (("openvino", "cpu", "fp32"), ("openvino", "gpu", "bf16"), ("onnxruntime", "cpu", "bf16")):
        assert find_engine(opened, **dict(zip(("backend", "device", "precision"), key, strict=True))) is None


def test_an_interrupted_write_leaves_the_manifest_as_it_was(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = add_engine(bundle)
    before = (bundle / MANIFEST).read_bytes()

    def write_half(path: Path, text: str, **options: Any) -> int:
        path.write_bytes(text[:99].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(KeyboardInterrupt):
        write_engine(bundle, replace(record, processor="Abacus"))
    assert (bundle / MANIFEST).read_bytes() == before
    assert not list(bundle.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"batch": 4}, ValueError),
        ({"plan": {}}, KeyError),
        ({"processor": None}, TypeError),
        ({"files": {}}, ValueError),
        ({"graphs": {}}, ValueError),
        ({"directory": Path("elsewhere")}, ValueError),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_record_that_could_not_be_read_is_not_written(
    bundle: Path, changes: dict[str, Any], error: type[Exception]
) -> None:
    record = add_engine(bundle)
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(error):
        write_engine(bundle, replace(record, **changes))
    assert (bundle / MANIFEST).read_bytes() == before


def test_engine_of_no_bundle_is_not_written(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle"):
        write_engine(tmp_path / "nowhere", add_engine(bundle))


def test_directory_names_backend_device_and_precision() -> None:
    directory = engine_directory(Path("faces"), backend="tensorrt", device="cuda:0", precision="fp16")
    assert directory == Path("faces/engines/tensorrt-cuda0-fp16")


@pytest.mark.parametrize(
    ("device", "precision", "options"),
    [
        ("cpu", "fp32", ""),
        ("cpu", "bf16", " --precision bf16"),
        ("gpu", "fp32", " --device gpu"),
        ("gpu", "bf16", " --device gpu --precision bf16"),
    ],
)
def test_command_has_the_options_that_are_needed(device: str, precision: str, options: str) -> None:
    command = build_command(Path("faces"), backend="openvino", device=device, precision=precision)
    assert command == f"restyle-deploy build faces --backend openvino{options}"


@pytest.mark.parametrize(
    ("path", "quoted"),
    [("faces", "faces"), ("my faces", "'my faces'"), ("-faces", "./-faces"), ("--help", "./--help"), ("/-a", "/-a")],
)
def test_path_in_a_command_is_read_as_one(path: str, quoted: str) -> None:
    assert quote_path(Path(path)) == quoted
    command = build_command(Path(path), backend="openvino", device="cpu", precision="fp32")
    assert command == f"restyle-deploy build {quoted} --backend openvino"


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, " --tune"),
        ({"plan": {**PLAN, "origin": "table"}}, ""),
        (
            {"build": {"verified": False, "reason": "no GPU", "options": ["--max-batch", "16", "--name", "a b"]}},
            " --tune --max-batch 16 --name 'a b'",
        ),
    ],
    ids=["tuned", "table", "options"],
)
def test_refusal_names_all_options_of_the_build(bundle: Path, changes: dict[str, Any], options: str) -> None:
    engine = add_engine(bundle, **changes)
    command = re.escape(f"restyle-deploy build {bundle} --backend onnxruntime{options}, or")
    with pytest.raises(BundleError, match=f"built for .*, this is Abacus; build it again: {command}"):
        check_engine(read_bundle(bundle), engine, library_versions=engine.library_versions, processors=("Abacus",))


TARGETED = ["--max-batch", "4", "--compute-capability", "8.9", "--compute-capability", "12.0", "--stripped"]


@pytest.mark.parametrize(
    ("options", "mended"),
    [
        (TARGETED, " --max-batch 4 --stripped"),
        (["--hardware-compatible", "--no-plugins"], " --no-plugins"),
        (["--no-plugins", "--hardware-compatible"], " --no-plugins"),
    ],
    ids=["named", "first", "last"],
)
def test_engine_for_other_processors_is_built_again_for_this_one(bundle: Path, options: list[str], mended: str) -> None:
    """What it was for is no part of the command, unless something else is wrong with it."""
    engine = add_engine(bundle, processor="sm_89", build={"verified": True, "reason": None, "options": options})
    versions = {"processors": ("sm_86",), "library_versions": engine.library_versions}
    expected = re.escape(
        f"this is sm_86; build it again: restyle-deploy build {bundle} --backend onnxruntime --tune{mended}, or"
    )
    with pytest.raises(BundleError, match=expected):
        check_engine(read_bundle(bundle), engine, **versions)  # type: ignore[arg-type]
    older = {"processors": ("sm_89",), "library_versions": {"onnxruntime": "0.9"}}
    with pytest.raises(BundleError, match=re.escape(f"--tune {' '.join(options)}, or")):
        check_engine(read_bundle(bundle), engine, **older)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "batches"),
    [({}, (1, None)), ({"profile": {"min": 2, "opt": 4, "max": 6}}, (2, 6))],
    ids=["any", "profile"],
)
def test_batches_are_those_of_the_profile(bundle: Path, facts: dict[str, Any], batches: tuple[int, int | None]) -> None:
    add_engine(bundle, build={"verified": True, "reason": None, **facts})
    assert read_bundle(bundle).engines[0].batches == batches


# Checked


@pytest.mark.parametrize("here", ["sm_86", "sm_89"])
def test_engine_for_several_processors_runs_on_each(bundle: Path, here: str) -> None:
    engine = add_engine(bundle, processor=join_processors(["sm_86", "sm_89"]))
    opened = read_bundle(bundle)
    check_engine(opened, engine, library_versions=engine.library_versions, processors=(here, "sm_80+"))
    with pytest.raises(BundleError, match="it was built for sm_86 or sm_89, this is sm_120, sm_80+"):
        check_engine(opened, engine, library_versions=engine.library_versions, processors=("sm_120", "sm_80+"))


def test_processor_whose_name_has_an_or_is_found(bundle: Path) -> None:
    engine = add_engine(bundle, processor="this or that")
    assert engine.runs_on(["this or that"])
    assert not engine.runs_on(["theother"])


@pytest.mark.parametrize(
    ("is_compatible", "here", "fits"),
    [
        (False, "10.9.0", True),
        (False, "10.10.0", False),
        (True, "10.9.0", True),
        (True, "10.10.0", True),
        (True, "10.8.0", False),
        (True, "11.0.0", False),
    ],
)
def test_later_version_is_accepted_where_the_engine_allows_it(
    bundle: Path, is_compatible: bool, here: str, fits: bool
) -> None:
    build = {"verified": True, "reason": None, "version_compatible": is_compatible}
    engine = add_engine(bundle, build=build, library_versions={"tensorrt": "10.9.0"})

    def check() -> None:
        check_engine(read_bundle(bundle), engine, library_versions={"tensorrt": here}, processors=(engine.processor,))

    if fits:
        check()
        return
    with pytest.raises(BundleError, match=f"it was built with tensorrt 10.9.0, here is tensorrt {here}"):
        check()


@pytest.mark.parametrize(
    ("built", "here", "fits"), [(None, None, True), (None, "ab", True), ("ab", "ab", True), ("ab", "cd", False)]
)
def test_engine_with_other_kernels_is_refused(bundle: Path, built: str | None, here: str | None, fits: bool) -> None:
    engine = add_engine(bundle, build={"verified": True, "reason": None, "plugin_hash": built})
    facts: dict[str, Any] = {"library_versions": engine.library_versions, "processors": (engine.processor,)}
    if fits:
        check_engine(read_bundle(bundle), engine, plugin_hash=here, **facts)
        return
    with pytest.raises(BundleError, match="it holds the kernels of another release; build it again: "):
        check_engine(read_bundle(bundle), engine, plugin_hash=here, **facts)


def test_engine_that_fits_is_accepted(bundle: Path) -> None:
    engine = add_engine(bundle, roles=ROLES)
    check_engine(read_bundle(bundle), engine, library_versions=engine.library_versions, processors=(engine.processor,))


@pytest.mark.parametrize("name", ["encoder.onnx", "preview.onnx", "target.onnx.data"])
@pytest.mark.parametrize("is_there", [False, True])
def test_files_are_checked_where_they_are_needed(bundle: Path, name: str, is_there: bool) -> None:
    engine = add_engine(bundle, roles=ROLES)
    (engine.directory / name).unlink()
    if is_there:
        (engine.directory / name).write_bytes(b"changed")
    opened = read_bundle(bundle)
    facts: dict[str, Any] = {"library_versions": engine.library_versions, "processors": ["other", engine.processor]}
    message = "changed since the build" if is_there else "missing; build it again"
    needed, others = {name.partition(".")[0]}, {"encoder", "target", "preview", "generator"} - {name.partition(".")[0]}
    checks: list[Callable[[], None]] = [
        lambda: check_engine(opened, engine, **facts),
        lambda: check_engine(opened, engine, roles=needed, **facts),
        lambda: check_engine_files(opened, engine),
        lambda: check_engine_files(opened, engine, roles=needed),
    ]
    for check in checks:
        with pytest.raises(BundleError, match=f"{re.escape(name)}: {message}"):
            check()
    check_engine(opened, engine, roles=others, **facts)
    check_engine_files(opened, engine, roles=others)


def test_file_that_belongs_to_no_graph_or_to_two_is_needed_by_all(bundle: Path) -> None:
    engine = add_engine(bundle, roles=("preview",))
    files = {**engine.files, "shared.bin": "ab", "generator-and-preview": "cd", "preview": "ef"}
    engine = replace(engine, files=files)
    needed = {path.name for path in engine.files_of({"encoder", "generator"})}
    graphs = {f"{role}.onnx{suffix}" for role in ("encoder", "generator") for suffix in ("", ".data")}
    assert needed == {*graphs, "shared.bin", "generator-and-preview"}
    assert {path.name for path in engine.files_of(engine.graphs)} == set(files)


# Damaged


def in_engine(*path: str | int, to: object) -> Callable[[Any], None]:
    def change(manifest: Any) -> None:
        value = manifest["engines"][0]
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


def graph_left_out(role: str) -> Callable[[Any], None]:
    return lambda manifest: manifest["engines"][0]["graphs"].pop(role)


def paths_of_record(record: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(record, dict) or path[:1] in {("files",), ("library_versions",), ("sources",)}:
        return [path]
    inner = [] if path[:1] == ("plan",) and len(path) == 2 else record
    return [path, *(deeper for key in inner for deeper in paths_of_record(record[key], (*path, key)))]


WRONG_VALUES = {
    "record": lambda manifest: manifest.update(engines=[None]),
    "list": lambda manifest: manifest.update(engines=[[]]),
    "twice": lambda manifest: manifest["engines"].append(manifest["engines"][0]),
    "backend": in_engine("backend", to=None),
    "device": in_engine("device", to=0),
    "precision": in_engine("precision", to=["fp32"]),
    "directory": in_engine("directory", to=None),
    "null byte": in_engine("directory", to="engines/a\0b"),
    "files": in_engine("files", to=["encoder.onnx"]),
    "hash of a file": in_engine("files", "encoder.onnx.data", to=None),
    "hash of a graph": in_engine("graphs", "encoder", "sha256", to="ab"),
    "file of a graph": in_engine("graphs", "encoder", "file", to="other.onnx"),
    "graph": in_engine("graphs", "encoder", to="encoder.onnx"),
    "graphs": in_engine("graphs", to=[]),
    "no graphs": in_engine("graphs", to={}),
    "no encoder": graph_left_out("encoder"),
    "no generator": graph_left_out("generator"),
    "no target": graph_left_out("target"),
    "another role": in_engine("graphs", "editor", to={"file": "encoder.onnx", "inputs": [], "outputs": []}),
    "no inputs": in_engine("graphs", "encoder", "inputs", to=[]),
    "no outputs": in_engine("graphs", "target", "outputs", to=[]),
    "name": in_engine("graphs", "target", "outputs", 0, "name", to="features"),
    "dtype": in_engine("graphs", "target", "outputs", 0, "dtype", to="float16"),
    "shape": in_engine("graphs", "target", "outputs", 0, "shape", to=["N", 2, 4]),
    "free size": in_engine("graphs", "target", "outputs", 0, "shape", to=["N", 2, "H", 5]),
    "zero": in_engine("graphs", "target", "outputs", 0, "shape", to=["N", 2, 0, 5]),
    "no number": in_engine("graphs", "preview", "inputs", 0, "shape", to=["N", 10.0, 16]),
    "no list": in_engine("graphs", "preview", "inputs", 0, "shape", to="N"),
    "static": in_engine("graphs", "preview", "inputs", 0, "shape", 0, to=1),
    "image of a preview": lambda manifest: manifest["engines"][0]["graphs"]["preview"]["outputs"].append(
        manifest["engines"][0]["graphs"]["generator"]["outputs"][0]
    ),
    "output twice": lambda manifest: manifest["engines"][0]["graphs"]["preview"]["outputs"].append(
        manifest["engines"][0]["graphs"]["preview"]["outputs"][0]
    ),
    "batch": in_engine("batch", to=2),
    "batch of another type": in_engine("batch", to=True),
    "batch of other graphs": in_engine("batch", to=1),
    "versions": in_engine("library_versions", to={"onnxruntime": 1}),
    "processor": in_engine("processor", to={}),
    "sources": in_engine("sources", "encoder", to=None),
    "plan": in_engine("plan", to="tuned"),
    "origin": in_engine("plan", "origin", to="guessed"),
    "choice": in_engine("plan", "choices", "encoder.input", to=3),
    "measurements": in_engine("plan", "measurements", to=[]),
    "measurement": in_engine("plan", "measurements", "generator.up.64", to=1.5),
    "time": in_engine("plan", "measurements", "generator.up.64", "polyphase", to="1"),
    "time that is none": in_engine("plan", "measurements", "generator.up.64", "polyphase", to=float("nan")),
    "seconds": in_engine("plan", "seconds", to=-1),
    "bool for seconds": in_engine("plan", "seconds", to=True),
    "build": in_engine("build", to="verified"),
    "no bool": in_engine("build", "verified", to=1),
    "reason of a verified one": in_engine("build", "reason", to="no GPU"),
    "not verified without a reason": in_engine("build", "verified", to=False),
    "options": in_engine("build", to={"verified": True, "reason": None, "options": "--max-batch 4"}),
    "option": in_engine("build", to={"verified": True, "reason": None, "options": [4]}),
    "profile": in_engine("build", "profile", to=[1, 1, 8]),
    "profile without min": in_engine("build", "profile", to={"max": 8}),
    "profile of texts": in_engine("build", "profile", to={"min": "1", "max": "8"}),
    "profile out of order": in_engine("build", "profile", to={"min": 4, "max": 2}),
    "profile for nothing": in_engine("build", "profile", to={"min": 0, "max": 2}),
}


def damage_of(bundle: Path) -> str:
    """Return why the only engine of a bundle cannot be used."""
    opened = read_bundle(bundle)
    assert not opened.engines
    (damaged,) = opened.damaged_engines
    return damaged.reason


@pytest.mark.parametrize("change", WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_damaged_record_spoils_that_engine_alone(bundle: Path, change: Callable[[Any], None]) -> None:
    other = add_engine(bundle, precision="bf16")
    add_engine(bundle, roles=ROLES)
    edit_manifest(bundle, lambda manifest: manifest["engines"].reverse())
    edit_manifest(bundle, change)
    opened = read_bundle(bundle)
    engines = {engine.precision: engine for engine in opened.engines}
    assert [engine.name for engine in opened.damaged_engines]
    assert all(
        re.match(r"(AttributeError|KeyError|TypeError|ValueError): |/", one.reason) for one in opened.damaged_engines
    )
    if change not in (WRONG_VALUES["record"], WRONG_VALUES["list"]):
        assert facts_of(engines["bf16"]) == facts_of(other)


def test_no_list_of_engines_damages_the_bundle(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(engines={}))
    with pytest.raises(BundleError, match=r"manifest\.json: damaged .*export the bundle again"):
        read_bundle(bundle)


@pytest.mark.parametrize(("precision", "option"), [("fp32", ""), ("bf16", " --precision bf16")])
def test_damaged_engine_is_refused_with_the_command(bundle: Path, precision: str, option: str) -> None:
    add_engine(bundle, precision=precision)
    edit_manifest(bundle, in_engine("plan", to="tuned"))
    opened = read_bundle(bundle)
    (damaged,) = opened.damaged_engines
    assert damaged.name == f"engines/onnxruntime-cpu-{precision}"
    assert damaged.key == ("onnxruntime", "cpu", precision)
    command = re.escape(f"restyle-deploy build {bundle} --backend onnxruntime{option}, or")
    with pytest.raises(BundleError, match=rf"is damaged: TypeError: plan is .*; build it again: {command} .*--plain"):
        find_engine(opened, backend="onnxruntime", device="cpu", precision=precision)
    assert find_engine(opened, backend="openvino", device="cpu", precision=precision) is None


def test_build_replaces_a_damaged_engine_and_keeps_others(bundle: Path) -> None:
    record = add_engine(bundle)
    add_engine(bundle, precision="bf16")
    edit_manifest(bundle, lambda manifest: [engine.pop("plan") for engine in manifest["engines"]])
    edit_manifest(bundle, lambda manifest: manifest["engines"].extend([None, {"directory": "engines/a"}]))
    assert len(read_bundle(bundle).damaged_engines) == 4
    write_engine(bundle, record)
    opened = read_bundle(bundle)
    assert [engine.key for engine in opened.engines] == [record.key]
    assert [damaged.key for damaged in opened.damaged_engines] == [("onnxruntime", "cpu", "bf16")]


def test_record_in_the_same_directory_is_replaced(bundle: Path) -> None:
    record = add_engine(bundle)
    edit_manifest(bundle, in_engine("precision", to="bf16"))
    write_engine(bundle, record)
    assert [engine.key for engine in read_bundle(bundle).engines] == [record.key]


def test_every_missing_key_is_noticed(bundle: Path) -> None:
    record = engine_as_json(add_engine(bundle, roles=ROLES), bundle)
    whole = (bundle / MANIFEST).read_bytes()
    paths = paths_of_record(json.loads(json.dumps(record)))[1:]
    assert ("graphs", "target", "outputs") in paths
    assert ("build", "verified") in paths
    for path in paths:

        def remove(manifest: Any, path: tuple[str, ...] = path) -> None:
            value = manifest["engines"][0]
            for key in path[:-1]:
                value = value[key]
            del value[path[-1]]

        if path == ("graphs", "preview"):  # may be absent
            continue
        (bundle / MANIFEST).write_bytes(whole)
        edit_manifest(bundle, remove)
        assert damage_of(bundle), path


@pytest.mark.parametrize("stated", ["../outside", ".", "engines", "engines/../other", "engines/..", "{folder}/outside"])
def test_directory_outside_the_engines_is_refused(bundle: Path, tmp_path: Path, stated: str) -> None:
    add_engine(bundle)
    stated = stated.format(folder=tmp_path)
    edit_manifest(bundle, in_engine("directory", to=stated))
    assert f"{stated} lies outside the bundle's engines" in damage_of(bundle)


@pytest.mark.parametrize("stated", ["../../encoder.onnx", "../other", "{folder}/outside"])
def test_file_outside_the_engines_directory_is_refused(bundle: Path, tmp_path: Path, stated: str) -> None:
    add_engine(bundle)
    stated = stated.format(folder=tmp_path)
    edit_manifest(bundle, in_engine("files", stated, to="ab"))
    assert f"{stated} lies outside the engine {ENGINES}/onnxruntime-cpu-fp32" in damage_of(bundle)


@pytest.mark.parametrize("name", ["encoder.onnx", "generator.onnx.data"])
def test_link_out_of_the_engines_directory_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    engine = add_engine(bundle)
    outside = (engine.directory / name).rename(tmp_path / "outside")
    (engine.directory / name).symlink_to(outside)
    assert f"{name} lies outside the engine" in damage_of(bundle)


def test_linked_directory_of_an_engine_is_refused(bundle: Path, tmp_path: Path) -> None:
    engine = add_engine(bundle)
    outside = engine.directory.rename(tmp_path / "outside")
    engine.directory.symlink_to(outside)
    assert "lies outside the bundle's engines" in damage_of(bundle)
