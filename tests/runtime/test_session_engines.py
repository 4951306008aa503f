"""Which graphs a session loads, and what it checks before: on a backend made up in Python."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restyle_deploy import Session, manifest
from restyle_deploy.backends.base import EngineOptions, RunnerOptions
from restyle_deploy.bundle import AVERAGE_IMAGE, EXPECTATION, LATENT_AVG, MANIFEST, open_bundle, write_manifest
from restyle_deploy.errors import BackendUnavailableError, BuildError, BundleError
from restyle_deploy.files import sha256_of_file
from restyle_deploy.runtime import opening as opening_module
from restyle_deploy.runtime.host_device import HostDevice
from tests.bundles import PLAN, add_engine, replace_array
from tests.fakes import VERSIONS, Buffers, FakeBackend, describe_target, encode, encode_features, generate, preview

COMPUTES = {"encoder": encode, "generator": generate, "target": describe_target, "preview": preview}
ARRAYS = {LATENT_AVG, AVERAGE_IMAGE, EXPECTATION}
ROLES = ("target", "preview")


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to change."""
    return shutil.copytree(toy_bundle, tmp_path / "bundle")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    """What all sessions run on."""
    backend = FakeBackend(COMPUTES)
    monkeypatch.setattr(opening_module, "load_backend", lambda name: backend)
    return backend


@pytest.fixture
def engine(bundle: Path, backend: FakeBackend) -> Path:
    """The directory of an engine of the bundle, with all roles."""
    backend.computes["encoder"] = encode_features
    return add_engine(bundle, roles=ROLES, library_versions=VERSIONS).directory


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that have been hashed so far."""
    files: list[Path] = []

    def note(path: Path) -> str:
        files.append(path)
        return sha256_of_file(path)

    monkeypatch.setattr(manifest, "sha256_of_file", note)
    return files


def test_graphs_are_loaded_whatever_others_capture(
    bundle: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries allocate and wait meanwhile, which would spoil a capture of another thread, and fail."""
    active: list[str] = []
    loaded: list[bool] = []
    load = backend.load

    @contextmanager
    def scope(self: HostDevice) -> Iterator[None]:
        active.append("here")
        yield
        active.pop()

    def note(*arguments: Any) -> Any:
        loaded.append(bool(active))
        return load(*arguments)

    monkeypatch.setattr(HostDevice, "unaffected_by_captures", scope)
    monkeypatch.setattr(backend, "load", note)
    Session.open(bundle).close()
    assert loaded == [True, True]
    assert active == []


def loaded_files(backend: FakeBackend) -> set[Path]:
    return {path for path, _ in backend.loaded}


def exported(bundle: Path) -> set[Path]:
    return {bundle / "encoder.onnx", bundle / "generator.onnx"}


def test_exported_graphs_are_loaded_where_there_is_no_engine(
    bundle: Path, backend: FakeBackend, hashed: list[Path]
) -> None:
    with Session.open(bundle) as session:
        assert session.describe() == {
            "backend": "onnxruntime",
            "device": "cpu",
            "threads": None,
            "precision": "fp32",
            "plan": "plain",
            "preview_steps": False,
            "library_versions": VERSIONS,
        }
        assert not session.is_approximate
    assert loaded_files(backend) == exported(bundle)
    assert sorted(hashed) == sorted({*exported(bundle), *(bundle / name for name in ARRAYS)})


@pytest.mark.parametrize("origin", ["tuned", "table"])
def test_engine_is_loaded_where_there_is_one(bundle: Path, backend: FakeBackend, origin: str) -> None:
    engine = add_engine(bundle, library_versions=VERSIONS, plan={**PLAN, "origin": origin}).directory
    with Session.open(bundle, threads=3) as session:
        assert session.describe()["plan"] == origin
    assert loaded_files(backend) == {engine / "encoder.onnx", engine / "generator.onnx"}
    assert {options.threads for _, options in backend.loaded} == {3}


def test_engine_is_loaded_as_it_was_built(bundle: Path, backend: FakeBackend) -> None:
    build = {"verified": True, "reason": None, "plugin_route": "functions", "version_compatible": True}
    add_engine(bundle, library_versions=VERSIONS, build=build)
    Session.open(bundle).close()
    Session.open(bundle, plain=True).close()
    found = [(options.plugin_route, options.host_code_allowed) for _, options in backend.loaded]
    assert found == [("functions", True)] * 2 + [(None, False)] * 2


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("least", "most", "max_batch", "runs"),
    [(1, 2, 8, [2, 2, 1]), (3, 4, 8, [4, 3]), (3, 8, 8, [5]), (3, 8, 1, [3, 3]), (1, 8, 3, [3, 2])],
    ids=str,
)
def test_runs_are_of_the_batches_that_an_engine_takes(
    bundle: Path,
    backend: FakeBackend,
    monkeypatch: pytest.MonkeyPatch,
    *,
    plain: bool,
    least: int,
    most: int,
    max_batch: int,
    runs: list[int],
) -> None:
    """Also of the exported graphs, where the backend builds an engine of them when it loads them."""
    profile = {"profile": {"min": least, "opt": least, "max": most}}
    target = replace(backend.check_build(RunnerOptions(), EngineOptions()), facts=profile if plain else {})
    monkeypatch.setattr(backend, "check_build", lambda *_: target)
    if not plain:
        add_engine(bundle, library_versions=VERSIONS, build={"verified": True, "reason": None, **profile})
    targets = np.random.default_rng(0).uniform(-1, 1, (5, 3, 32, 32)).astype(np.float32)
    sizes: list[int] = []

    def count(buffers: Buffers) -> None:
        sizes.append(len(buffers["target"]))
        encode(buffers)

    backend.computes["encoder"] = count
    with Session.open(bundle, plain=plain) as session:
        found = session.invert(targets, steps=2, every_step=True, max_batch=max_batch)
    assert sizes[::2] == sizes[1::2] == runs
    start = np.float64(open_bundle(bundle).latent_avg)
    difference = targets.mean(axis=(1, 2, 3)) - open_bundle(bundle).average_image.mean()
    np.testing.assert_allclose(found.latents[0], start + difference[:, None, None], atol=1e-5)


@pytest.mark.parametrize("preview_steps", [False, True])
def test_no_file_is_hashed_that_is_not_loaded(
    bundle: Path, engine: Path, backend: FakeBackend, hashed: list[Path], preview_steps: bool
) -> None:
    for name in exported(bundle):
        name.write_bytes(b"changed")
    roles = {"encoder", "generator", "target", *(["preview"] if preview_steps else [])}
    with Session.open(bundle, preview_steps=preview_steps) as session:
        assert session.describe()["preview_steps"] is preview_steps
        assert session.is_approximate is preview_steps
    assert loaded_files(backend) == {engine / f"{role}.onnx" for role in roles}
    expected = {engine / f"{role}.onnx{suffix}" for role in roles for suffix in ("", ".data")}
    assert sorted(hashed) == sorted({*expected, *(bundle / name for name in ARRAYS)})


def test_roles_of_the_engine_run(bundle: Path, engine: Path, backend: FakeBackend) -> None:
    targets = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    with Session.open(bundle, preview_steps=True) as session:
        session.invert(targets, steps=4)
    runs = {role: len(runner.ran) for role, runner in backend.runners.items()}
    assert runs == {"target": 1, "encoder": 4, "preview": 3, "generator": 1}
    with Session.open(bundle) as session:
        with_engine = session.invert(targets, steps=4)
    assert "preview" not in {path.stem for path, _ in backend.loaded[4:]}
    backend.computes["encoder"] = encode
    with Session.open(bundle, plain=True) as session:
        plain = session.invert(targets, steps=4)
    np.testing.assert_allclose(with_engine.latents, plain.latents, rtol=0, atol=1e-5)
    np.testing.assert_allclose(with_engine.images, plain.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_leaves_engines_aside(bundle: Path, engine: Path, backend: FakeBackend, precision: str) -> None:
    (engine / "encoder.onnx").write_bytes(b"changed")
    with Session.open(bundle, plain=True, precision=precision) as session:
        assert session.describe()["plan"] == "plain"
        assert session.is_approximate is (precision == "bf16")
    assert loaded_files(backend) == exported(bundle)
    assert {options.precision for _, options in backend.loaded} == {precision}


def test_engine_of_the_precision_is_loaded(bundle: Path, engine: Path, backend: FakeBackend) -> None:
    other = add_engine(bundle, precision="bf16", library_versions=VERSIONS).directory
    with Session.open(bundle, precision="bf16") as session:
        assert session.is_approximate
        assert session.describe()["precision"] == "bf16"
    assert {path.parent for path in loaded_files(backend)} == {other} != {engine}
    assert {options.precision for _, options in backend.loaded} == {"bf16"}


def test_mixed_precision_is_float32_in_the_encoder_only(bundle: Path, backend: FakeBackend) -> None:
    backend.computes["encoder"] = encode_features
    add_engine(bundle, precision="mixed", roles=ROLES, library_versions=VERSIONS)
    with Session.open(bundle, precision="mixed", preview_steps=True) as session:
        assert session.is_approximate
        assert session.describe()["precision"] == "mixed"
    assert {path.stem: options.precision for path, options in backend.loaded} == {
        "target": "fp32",
        "encoder": "fp32",
        "generator": "bf16",
        "preview": "bf16",
    }


@pytest.mark.usefixtures("engine")
def test_missing_engine_of_a_precision_names_the_command(bundle: Path, backend: FakeBackend) -> None:
    command = f"restyle-deploy build {bundle} --backend onnxruntime --precision bf16"
    expected = rf"has no engine for .* precision bf16; build it: {re.escape(command)}, or .*--plain \(plain=True\)"
    with pytest.raises(BundleError, match=expected):
        Session.open(bundle, precision="bf16")
    assert not backend.loaded


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "library": ({"library_versions": {"fake": "0.9"}}, r"built with fake 0\.9, here is fake 1\.0"),
    "processor": ({"processor": "Abacus (beads)"}, r"built for Abacus \(beads\), this is "),
    "graph": ({"sources": {"encoder": "ab", "generator": "cd"}}, "built from other graphs than the bundle's"),
    "graph less": ({"sources": {}}, "built from other graphs than the bundle's"),
    "all": (
        {"library_versions": {}, "processor": "Abacus", "sources": {}},
        "built with .*; it was built for .*; it was built from",
    ),
}


@pytest.mark.parametrize(("changes", "message"), MISMATCHES.values(), ids=MISMATCHES.keys())
@pytest.mark.parametrize(("precision", "option"), [("fp32", ""), ("bf16", " --precision bf16")])
def test_engine_that_does_not_fit_is_refused_with_the_command(
    bundle: Path, backend: FakeBackend, changes: dict[str, Any], message: str, precision: str, option: str
) -> None:
    add_engine(bundle, precision=precision, **{"library_versions": VERSIONS, **changes})
    command = f"build it again: restyle-deploy build {bundle} --backend onnxruntime{option} --tune, or "
    expected = rf"the engine cannot be used: it was {message}.*; {re.escape(command)}.*--plain \(plain=True\)"
    with pytest.raises(BundleError, match=expected):
        Session.open(bundle, precision=precision)
    assert not backend.loaded


@pytest.mark.parametrize("name", ["encoder.onnx", "target.onnx.data"])
@pytest.mark.parametrize(("content", "message"), [(b"changed", "changed since the build"), (None, "missing")])
def test_changed_file_of_the_engine_is_refused(
    bundle: Path, engine: Path, backend: FakeBackend, name: str, content: bytes | None, message: str
) -> None:
    (engine / name).unlink()
    if content:
        (engine / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{re.escape(name)}: {message}.*; build it again: restyle-deploy build .*"):
        Session.open(bundle)
    assert not backend.loaded


def test_previews_without_their_graph_name_the_command(bundle: Path, backend: FakeBackend) -> None:
    command = re.escape(f"restyle-deploy build {bundle} --backend onnxruntime")
    expected = f"preview steps need an engine with a preview graph, which the bundle has not; build it: {command}$"
    with pytest.raises(BundleError, match=expected):
        Session.open(bundle, preview_steps=True)
    add_engine(bundle, roles=("target",), library_versions=VERSIONS)
    with pytest.raises(BundleError, match=expected):
        Session.open(bundle, preview_steps=True)
    assert not backend.loaded


@pytest.mark.usefixtures("engine")
def test_previews_and_plain_exclude_each_other(bundle: Path, backend: FakeBackend) -> None:
    with pytest.raises(BundleError, match="which plain leaves aside; leave one of the two out"):
        Session.open(bundle, plain=True, preview_steps=True)
    assert not backend.loaded


@pytest.mark.parametrize("plain", [False, True])
def test_previews_change_nothing_where_the_image_is_of_the_encoders_size(
    bundle: Path, backend: FakeBackend, plain: bool
) -> None:
    config = open_bundle(bundle).config
    config = replace(config, output_size=config.input_size)
    replace_array(bundle, LATENT_AVG, np.zeros((config.n_styles, config.style_dim), np.float32))
    write_manifest(bundle, config=config, checkpoint_sha256="")
    targets = np.zeros((1, 3, *config.input_shape), np.float32)
    with Session.open(bundle, plain=plain, preview_steps=True) as session:
        assert session.describe()["preview_steps"] is False
        assert not session.is_approximate
        assert len(session.invert(targets, steps=3, every_step=True).images) == 3
    assert loaded_files(backend) == exported(bundle)


def test_options_are_checked_before_the_bundle(bundle: Path, backend: FakeBackend) -> None:
    (bundle / MANIFEST).unlink()
    with pytest.raises(BackendUnavailableError, match="device 'abacus' cannot run here"):
        Session.open(bundle, device="abacus")
    with pytest.raises(BundleError, match="no bundle"):
        Session.open(bundle)


def test_graphs_loaded_before_one_that_is_refused_are_released(
    bundle: Path, engine: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = backend.load

    def load_all_but_the_target(file: Path, *arguments: Any) -> Any:
        if file == engine / "target.onnx":
            raise BuildError("refused")
        return load(file, *arguments)

    monkeypatch.setattr(backend, "load", load_all_but_the_target)
    with pytest.raises(BuildError, match="refused"):
        Session.open(bundle)
    assert all(runner.closed == 1 for runner in backend.runners.values())
