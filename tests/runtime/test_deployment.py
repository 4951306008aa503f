"""`deploy.toml`: written, read, opened; and what is refused."""

import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restyle_deploy import Session
from restyle_deploy.errors import BundleError
from restyle_deploy.runtime.deployment import Deployment, read_deployment, write_deployment
from restyle_deploy.runtime.opening import deployment_of
from tests.pictures import picture

WHOLE = Deployment(
    bundle=Path("bundle"),
    backend="tensorrt-rtx",
    device="cuda:1",
    precision="fp16",
    plain=True,
    preview_steps=True,
    threads=3,
    max_batch=4,
    steps=2,
)


@pytest.mark.parametrize("deployment", [WHOLE, Deployment(bundle=Path("bundle"))])
def test_what_is_written_is_read(tmp_path: Path, deployment: Deployment) -> None:
    write_deployment(tmp_path / "deploy.toml", Deployment(**{**vars(deployment), "bundle": tmp_path / "bundle"}))
    found = read_deployment(tmp_path / "deploy.toml")
    assert found == Deployment(**{**vars(deployment), "bundle": tmp_path / "bundle"})


def test_file_is_as_people_write_it(tmp_path: Path) -> None:
    write_deployment(tmp_path / "deploy.toml", Deployment(bundle=tmp_path.parent / "bundles" / "a", steps=3))
    assert (tmp_path / "deploy.toml").read_text() == (
        "# Run by restyle_deploy.Session.open; the bundle is relative to this file.\n"
        'bundle = "../bundles/a"\nbackend = "onnxruntime"\nprecision = "fp32"\nplain = false\npreview_steps = false\n'
        "steps = 3\n"
    )


def test_bundle_may_move_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_deployment(tmp_path / "a" / "deploy.toml", Deployment(bundle=tmp_path / "a" / "bundle"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert read_deployment(tmp_path / "b" / "deploy.toml").bundle == tmp_path / "b" / "bundle"


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_bundle_is_found_through_links(tmp_path: Path) -> None:
    for name in ("disk/out", "versions/2", "home"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "home" / "out").symlink_to(tmp_path / "disk" / "out")
    (tmp_path / "home" / "bundle").symlink_to(tmp_path / "versions" / "2")
    write_deployment(tmp_path / "home" / "out" / "deploy.toml", Deployment(bundle=tmp_path / "home" / "bundle"))
    for folder in ("home", "disk"):
        found = read_deployment(tmp_path / folder / "out" / "deploy.toml").bundle
        assert found.name == "bundle"
        assert found.samefile(tmp_path / "versions" / "2")


@given(device=st.text())
def test_any_text_is_kept(tmp_path_factory: pytest.TempPathFactory, device: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    write_deployment(path, Deployment(bundle=path.parent, device=device))
    assert read_deployment(path).device == device


BAD: list[tuple[str, str]] = [
    ("", "no deployment: no bundle. Known are bundle, backend, .*; only bundle is required"),
    ('bundle = "b"\nstep = 5\n', "unknown step"),
    ("bundle = 5\n", "bundle is 5, expected a string"),
    ('bundle = "b"\nsteps = "5"\nplain = 1\n', "plain is 1, expected true or false; steps is '5', expected a whole"),
    ('bundle = "b"\nsteps = true\n', "steps is True, expected a whole number"),
    ('bundle = "b"\nsteps = 0\nthreads = -1\n', "threads is -1, expected at least 1; steps is 0, expected at least 1"),
    ('bundle = "b"\nbackend = "abacus"\n', "backend is 'abacus', expected one of onnxruntime, "),
    ('bundle = "b"\nprecision = "fp64"\n', "precision is 'fp64', expected one of fp32, "),
    ("bundle = \n", r"deploy\.toml: no TOML \("),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "deploy.toml").write_text(text)
    for read in (read_deployment, Session.open):
        with pytest.raises(BundleError, match=message):
            read(tmp_path / "deploy.toml")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    expected = f"{re.escape(str(tmp_path / 'deploy.toml'))}: cannot be read: No such file"
    with pytest.raises(BundleError, match=expected):
        Session.open(tmp_path / "deploy.toml")


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deploy.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="no TOML"):
        read_deployment(tmp_path / "deploy.toml")


def test_arguments_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deploy.toml"
    write_deployment(path, Deployment(**{**vars(WHOLE), "bundle": tmp_path}))
    given_values = {"backend": None, "threads": 1, "plain": False, "precision": None}
    assert deployment_of(path, given_values) == Deployment(
        **{**vars(WHOLE), "bundle": tmp_path, "threads": 1, "plain": False}
    )


def test_session_is_opened_as_the_file_says(toy_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "deploy.toml"
    write_deployment(path, Deployment(bundle=toy_bundle, plain=True, threads=1, max_batch=2, steps=2))
    images = picture(0)[None]
    with Session.open(path) as session, Session.open(toy_bundle, threads=1) as plain:
        assert session.describe() == plain.describe()
        assert (session.invert(images).latents == plain.invert(images, steps=2).latents).all()
        assert (session.invert(images, steps=3).latents == plain.invert(images, steps=3).latents).all()
    with Session.open(path, threads=2) as session:
        assert session.describe()["threads"] == 2


def test_folder_of_that_name_is_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "bundle.toml").mkdir()
    with pytest.raises(BundleError, match="no bundle"):
        Session.open(tmp_path / "bundle.toml")


@pytest.mark.parametrize("name", ["threads", "max_batch"])
def test_counts_below_one_are_refused(toy_bundle: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        deployment_of(toy_bundle, {name: 0})
