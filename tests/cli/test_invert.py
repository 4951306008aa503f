import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from restyle_deploy import Session
from restyle_deploy.bundle import open_bundle
from restyle_deploy.runtime import folder
from restyle_deploy.runtime.images import save_image
from tests.bundles import add_engine
from tests.cli.conftest import Run
from tests.pictures import write_bad_files, write_picture


def files_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_images_and_latents_are_written(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("invert", toy_bundle, photos, "-o", output, "--steps", 2)
    assert result.exit_code == 0
    assert result.stdout == f"2 of 2 images inverted in 2 steps: {output}\n"
    assert result.stderr == ""  # no progress bar where there is no terminal
    assert files_in(output) == {"a.png", "b.png", "latents.npz"}
    config = open_bundle(toy_bundle).config
    with Image.open(output / "a.png") as image:
        assert image.size == config.image_shape[::-1]
    with np.load(output / "latents.npz") as arrays:
        assert arrays["names"].tolist() == ["a", "b"]
        assert arrays["latents"].shape == (2, config.n_styles, config.style_dim)


def test_five_steps_unless_told(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    assert "inverted in 5 steps" in run("invert", toy_bundle, photos, "-o", tmp_path / "default").stdout
    run("invert", toy_bundle, photos, "-o", tmp_path / "five", "--steps", 5)
    default, five = ((tmp_path / name / "latents.npz").read_bytes() for name in ("default", "five"))
    assert default == five


def test_layouts_reach_the_files(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    run("invert", toy_bundle, photos / "a.png", "-o", tmp_path / "every", "--steps", 2, "--every-step")
    assert files_in(tmp_path / "every") == {"a.png", "step-1/a.png", "step-2/a.png", "latents.npz"}
    run("invert", toy_bundle, photos / "b.jpg", "-o", tmp_path / "official", "--steps", 2, "--official-layout")
    images = {"inference_results/0/b.jpg", "inference_results/1/b.jpg"}
    assert files_in(tmp_path / "official") == images | {"latents.npy"}
    run("invert", toy_bundle, photos / "a.png", "-o", tmp_path / "small", "--resize")
    with Image.open(tmp_path / "small" / "a.png") as image:
        assert image.size == open_bundle(toy_bundle).config.input_shape[::-1]


def test_options_reach_the_session(
    run: Run, toy_bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []
    batches: list[int] = []
    open_session, invert = Session.open, Session.invert

    def record_open(bundle: Path, **options: Any) -> Session:
        opened.append(options)
        return open_session(bundle, **options)

    def record_invert(session: Session, images: Any, **options: Any) -> Any:
        batches.append(len(images))
        return invert(session, images, **options)

    monkeypatch.setattr(Session, "open", record_open)
    monkeypatch.setattr(Session, "invert", record_invert)
    arguments = ("--threads", 1, "--batch-size", 2, "--backend", "onnxruntime", "--device", "cpu")
    assert run("invert", toy_bundle, photos, "-o", tmp_path / "out", *arguments).exit_code == 0
    assert run("invert", toy_bundle, photos, "-o", tmp_path / "out", "--plain").exit_code == 0
    assert run("invert", toy_bundle, photos, "-o", tmp_path / "out", "--preview-steps").exit_code == 1
    assert run("invert", toy_bundle, photos, "-o", tmp_path / "out", "--precision", "bf16").exit_code == 1
    default = {"precision": "fp32", "plain": False, "preview_steps": False, "max_batch": 1}
    cpu = {"backend": "onnxruntime", "device": "cpu", "threads": None, **default}
    assert opened == [
        {**cpu, "threads": 1, "max_batch": 2},
        {**cpu, "plain": True},
        {**cpu, "preview_steps": True},
        {**cpu, "precision": "bf16"},
    ]
    assert batches == [2, 1, 1]


def test_runs_are_no_larger_than_the_images_are_many(
    run: Run, toy_bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    open_session = Session.open

    def record(bundle: Path, **options: Any) -> Session:
        asked.append(options["max_batch"])
        return open_session(bundle, **options)

    monkeypatch.setattr(Session, "open", record)
    arguments = ("-o", tmp_path / "out", "--steps", 1, "--batch-size", 1_000_000)
    assert run("invert", toy_bundle, photos, *arguments).exit_code == 0
    result = run("invert", toy_bundle, photos / "a.png", *arguments)
    assert result.stdout == f"1 of 1 image inverted in 1 step: {tmp_path / 'out'}\n"
    assert asked == [2, 1]


def test_files_that_are_passed_over_are_told_once(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("a.txt", "more/b.AVIF", "README", ".hidden.txt", ".cache/c.txt"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).touch()
    output = photos / "out"
    for _ in range(2):  # what the first run has written is no input that is passed over
        result = run("invert", toy_bundle, photos, photos, "-o", output, "--steps", 1)
        assert result.exit_code == 0
        assert result.stderr == "3 files passed over, by extension: .avif, .txt, no extension\n"
    (photos / "a.txt").unlink()
    (photos / "README").unlink()
    result = run("invert", toy_bundle, photos, "-o", output, "--steps", 1)
    assert result.stderr == "1 file passed over, by extension: .avif\n"


def test_help_says_what_is_taken_of_folders_and_animations(run: Run) -> None:
    text = " ".join(run("invert", "--help").stdout.split())
    assert "in folders the extension decides" in text
    assert "Of an animated image the first frame is taken." in text


@pytest.mark.parametrize("option", ["--every-step", "--official-layout"])
def test_previews_are_not_written(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path, option: str) -> None:
    result = run("invert", toy_bundle, photos, "-o", tmp_path / "out", "--preview-steps", option)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--preview-steps renders the last step only, but every step is to be written" in result.stderr
    assert not (tmp_path / "out").exists()


def test_engine_that_cannot_be_used_is_one_line(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    add_engine(bundle, library_versions={"onnxruntime": "0.1"})
    result = run("invert", bundle, photos, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    command = re.escape(f"restyle-deploy build {bundle} --backend onnxruntime")
    assert re.fullmatch(rf"Error: .*built with onnxruntime 0\.1, here is .*{command}.*--plain.*\n", result.stderr)
    assert run("invert", bundle, photos, "-o", tmp_path / "out", "--plain").exit_code == 0


@pytest.mark.parametrize("batch_size", [1, 2])
def test_bad_files_are_named_and_the_others_done(
    run: Run, toy_bundle: Path, photos: Path, tmp_path: Path, batch_size: int
) -> None:
    bad = write_bad_files(photos)
    output = tmp_path / "out"
    result = run("invert", toy_bundle, photos, "-o", output, "--steps", 1, "--batch-size", batch_size)
    assert result.exit_code == 1
    assert result.stdout == f"2 of 6 images inverted in 1 step: {output}\n"
    lines = result.stderr.splitlines()
    assert len(lines) == 4
    for path in bad:
        assert sum(line.startswith(f"Error: {path}: ") for line in lines) == 1, (path, lines)
    assert files_in(output) == {"a.png", "b.png", "latents.npz"}


def test_json_tells_all(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "c.png").write_bytes(b"")
    result = run("invert", toy_bundle, photos, "-o", tmp_path / "out", "--steps", 1, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "output": str(tmp_path / "out"),
        "names": ["a", "b"],
        "images": [str(tmp_path / "out" / "a.png"), str(tmp_path / "out" / "b.png")],
        "latents": str(tmp_path / "out" / "latents.npz"),
        "failures": [{"path": str(photos / "c.png"), "reason": f"{photos / 'c.png'}: empty file"}],
    }


def test_json_where_all_failed(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    result = run("invert", toy_bundle, tmp_path / "text.png", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert (facts["names"], facts["latents"], len(facts["failures"])) == ([], None, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text on this system")
def test_file_names_that_are_no_text_can_be_printed(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    write_picture(tmp_path / "in" / name)
    result = run("invert", toy_bundle, tmp_path / "in", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["names"] == [name.removesuffix(".png")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.png", "-o", "out"], "nothing.png: no such file or folder"),
        (["empty", "-o", "out"], "empty: no images in this folder"),
        (["a.png", "-o", "."], "a.png: the output would overwrite an input"),
        (["a.png", "-o", "file"], "file.*: (File exists|Not a directory)"),
        (["a.png", "-o", "file/out"], "file.*: Not a directory"),
    ],
)
def test_unusable_paths_are_one_line(
    run: Run, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    result = run("invert", toy_bundle, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(rf"Error: .*{message}.*\n", result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_one_line(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    result = run("invert", toy_bundle, photos, "-o", tmp_path / "locked" / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*locked.*: Permission denied\n", result.stderr)


def test_interrupt_leaves_whole_files_only(
    run: Run, toy_bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_the_first_only(path: Path, image: Any, **options: Any) -> None:
        if path.name == "b.png":
            raise KeyboardInterrupt
        save_image(path, image, **options)

    monkeypatch.setattr(folder, "save_image", save_the_first_only)
    result = run("invert", toy_bundle, photos, "-o", tmp_path / "out", "--steps", 1)
    assert result.exit_code == 130
    assert "Aborted!" in result.stderr
    assert files_in(tmp_path / "out") == {"a.png", "latents.npz"}


def test_changed_bundle_is_refused(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    (bundle / "generator.onnx").write_bytes(b"")
    result = run("invert", bundle, photos, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*generator\.onnx: changed since the export.*\n", result.stderr)


def test_terminal_shows_progress_with_rate_and_time_left(toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    pty, fcntl, termios = (
        pytest.importorskip(name, reason="no pseudo-terminals on this system") for name in ("pty", "fcntl", "termios")
    )
    (photos / "bad.png").write_bytes(b"")
    program = "from restyle_deploy.cli.main import main; main()"
    arguments = ["invert", str(toy_bundle), str(photos), "-o", str(tmp_path / "out"), "--steps", "1"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=theirs, text=True, check=False
        )
    finally:
        os.close(theirs)
    shown = read_terminal(ours)
    assert done.returncode == 1
    assert done.stdout == f"2 of 3 images inverted in 1 step: {tmp_path / 'out'}\n"
    assert re.search(r"100%.*3/3 \[\d\d:\d\d<\d\d:\d\d, +[\d.?]+ ?(image/s|s/image)\]", shown), shown
    assert f"Error: {photos / 'bad.png'}: empty file" in shown


def read_terminal(descriptor: int) -> str:
    """Return what was written to the other end, which is closed."""
    chunks = []
    try:
        while chunk := os.read(descriptor, 4096):
            chunks.append(chunk)
    except OSError:  # how Linux tells the end
        pass
    finally:
        os.close(descriptor)
    return b"".join(chunks).decode()
