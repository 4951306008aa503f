"""What all commands share: help, exit status, errors in one line; and the command as it is installed."""

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from restyle_deploy import __version__, errors
from restyle_deploy.cli import main as main_module
from restyle_deploy.cli.main import main
from restyle_deploy.errors import RestyleDeployError
from tests.cli.conftest import Run
from tests.pictures import write_picture

COMMANDS = tuple(main.commands)
HEAVY = ("torch", "onnx", "onnxscript", "onnxruntime", "matplotlib", "skimage")

HELP = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from click.testing import CliRunner
from restyle_deploy.cli.main import main
for command in main.commands:
    result = CliRunner().invoke(main, [command, "--help"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    print(f"# {command}")
    print(result.output)
"""

LOGGING = """
import logging
from restyle_deploy.cli.main import main
def log(**_):
    ours = logging.getLogger("restyle_deploy.build")
    ours.warning("slow")
    ours.info("tactic")
    ours.debug("detail")
    logging.getLogger("another").warning("odd")
    logging.getLogger("another").info("as ever, not shown")
main.commands["doctor"].callback = log
main()
"""


def assert_one_line_error(result: Result, message: str) -> None:
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(r"Error: [^\n]+\n", result.stderr), result.stderr
    assert re.search(message, result.stderr), result.stderr


def test_every_command_shows_an_example_and_needs_no_library_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", HELP, ",".join(HEAVY)], capture_output=True, text=True, check=True)
    texts = dict(zip(COMMANDS, re.split(r"^# .*\n", done.stdout, flags=re.MULTILINE)[1:], strict=True))
    assert set(texts) == {"export", "build", "invert", "bench", "report", "compare", "verify", "inspect", "doctor"}
    for command, text in texts.items():
        assert f"Example: restyle-deploy {command}" in " ".join(text.split()), text


def test_examples_of_the_help_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, command in main.commands.items():
        assert command.help is not None
        example = command.help.split("Example: restyle-deploy ")[1].split()
        monkeypatch.setattr(command, "callback", lambda **arguments: None)
        result = CliRunner().invoke(main, example, catch_exceptions=False)
        assert result.exit_code == 0, (name, result.output)


def test_help_and_version_of_the_program(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "Example:\n    restyle-deploy export restyle_psp_ffhq_encode.pt -o faces\n" in result.stdout
    assert all(command in result.stdout for command in COMMANDS)
    assert run("--version").stdout.strip().endswith(__version__)


@pytest.mark.parametrize(
    "arguments",
    [
        ["launch"],
        ["--unknown"],
        *([command, "--unknown"] for command in COMMANDS),
        *([command] for command in COMMANDS if command != "doctor"),
        ["doctor", "more"],
        ["invert", "bundle"],
        ["invert", "bundle", "photo.png"],
        ["invert", "bundle", "photo.png", "-o"],
        ["invert", "bundle", "photo.png", "-o", "out", "--steps", "0"],
        ["invert", "bundle", "photo.png", "-o", "out", "--steps", "two"],
        ["invert", "bundle", "photo.png", "-o", "out", "--batch-size", "0"],
        ["invert", "bundle", "photo.png", "-o", "out", "--threads", "0"],
        ["invert", "bundle", "photo.png", "-o", "out", "--backend", "abacus"],
        ["bench", "bundle", "photo.png", "-o", "out", "--steps", ""],
        ["bench", "bundle", "photo.png", "-o", "out", "--steps", "1,two"],
        ["bench", "bundle", "photo.png", "-o", "out", "--steps", "0,1"],
        ["bench", "bundle", "photo.png", "-o", "out", "--steps", "1,1"],
        ["bench", "bundle", "photo.png", "-o", "out", "--repeats", "0"],
        ["bench", "bundle", "photo.png", "-o", "out", "--warmup", "-1"],
        ["export", "checkpoint.pt"],
        ["build", "bundle"],
        ["build", "bundle", "--backend", "abacus"],
        ["build", "bundle", "--backend", "onnxruntime", "--precision", "fp8"],
        ["build", "bundle", "--backend", "onnxruntime", "--threads", "0"],
        ["build", "bundle", "--backend", "onnxruntime", "--seconds", "-1"],
        ["verify", "bundle", "more"],
        ["inspect", "bundle", "--threads", "1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == "" or arguments == []
    assert re.search(r"^(Error: |Usage: )", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.output


ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RestyleDeployError)]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_the_package_are_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, error: type[RestyleDeployError]
) -> None:
    def fail(**_: Any) -> None:
        raise error("got this, expected that; run: restyle-deploy doctor")

    help_text = main.commands[command].help
    assert help_text is not None
    monkeypatch.setattr(main.commands[command], "callback", fail)
    example = help_text.split("Example: restyle-deploy ")[1].split()
    assert_one_line_error(run(*example), "^Error: got this, expected that; run: restyle-deploy doctor$")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "out/a.png"), "^Error: out/a.png: Permission denied$"),
        (OSError(errno.ENOSPC, "No space left on device"), "^Error: No space left on device$"),
    ],
)
def test_errors_of_the_system_are_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: OSError, message: str
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(main.commands["doctor"], "callback", fail)
    assert_one_line_error(run("doctor"), message)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("of our own"), ValueError("a bug")])
def test_bugs_keep_their_traceback(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(main.commands["doctor"], "callback", fail)
    with pytest.raises(type(error)) as caught:
        run("doctor")
    assert caught.value is error


def test_closed_pipe_ends_quietly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(main.commands["doctor"], "callback", fail)
    result = run("doctor")
    assert result.exit_code == 1
    assert result.output == ""


def test_interrupt_exits_as_shells_have_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main.commands["doctor"], "callback", fail)
    result = run("doctor")
    assert result.exit_code == 130
    assert result.stderr == "\nAborted!\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "slow\nodd\n"),
        (["-v"], "WARNING restyle_deploy.build: slow\nINFO restyle_deploy.build: tactic\nodd\n"),
        (
            ["--verbose", "-v"],
            "WARNING restyle_deploy.build: slow\nINFO restyle_deploy.build: tactic\n"
            "DEBUG restyle_deploy.build: detail\nodd\n",
        ),
    ],
)
def test_log_is_shown_when_asked_for(options: list[str], expected: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOGGING, *options, "doctor"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", expected)


def test_log_is_as_before_after_a_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.commands["doctor"], "callback", lambda **_: None)
    logger = logging.getLogger("restyle_deploy")
    before = (logger.level, list(logger.handlers))
    assert run("-vv", "doctor").exit_code == 0
    assert (logger.level, logger.handlers) == before


@pytest.mark.parametrize("command", ["invert", "bench", "verify", "inspect"])
def test_missing_bundle_is_one_line(run: Run, photos: Path, tmp_path: Path, command: str) -> None:
    more = [photos, "-o", tmp_path / "out"] if command in ("invert", "bench") else []
    assert_one_line_error(run(command, tmp_path / "nothing", *more), r"nothing: no bundle .*restyle-deploy export")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["invert", "bench", "verify", "inspect"])
def test_manifest_that_is_nested_too_deeply_is_one_line(run: Run, photos: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("[" * 100_000)
    more = [photos, "-o", tmp_path / "out"] if command in ("invert", "bench") else []
    assert_one_line_error(run(command, tmp_path / "bundle", *more), r"manifest\.json: not JSON \(nested too deeply\)")


@pytest.mark.parametrize("command", ["invert", "bench", "verify"])
def test_missing_device_is_one_line(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path, command: str) -> None:
    more = [photos, "-o", tmp_path / "out"] if command in ("invert", "bench") else []
    assert_one_line_error(run(command, toy_bundle, *more, "--device", "abacus"), "'abacus' cannot run here; available")


def test_every_file_of_the_folder_is_a_command() -> None:
    folder = Path(main_module.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "main", "options", "bench_options"}
    assert files == set(COMMANDS)
    assert all(isinstance(command, click.Command) for command in main.commands.values())


def find_installed_command() -> str:
    """Return the path of the command as it is installed with this interpreter."""
    found = shutil.which("restyle-deploy", path=sysconfig.get_path("scripts"))
    assert found is not None, "the package is not installed; run: pip install -e ."
    return found


def test_installed_command_does_the_main_job(toy_bundle: Path, tmp_path: Path) -> None:
    write_picture(tmp_path / "photo.jpg")
    command = [find_installed_command(), "invert", str(toy_bundle), "photo.jpg", "-o", "out", "--steps", "2", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["names"] == ["photo"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"photo.png", "latents.npz"}


def test_installed_command_fails_in_one_line(tmp_path: Path) -> None:
    command = [find_installed_command(), "inspect", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"Error: nothing: no bundle [^\n]+\n", done.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text on this system")
def test_bundle_whose_name_is_no_text_can_be_printed(toy_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff")).symlink_to(toy_bundle)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    command: list[str | bytes] = [find_installed_command(), "inspect", b"\xff"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].endswith(" \\udcff")
