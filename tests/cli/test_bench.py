import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from restyle_deploy.bench.job import Job
from restyle_deploy.bench.metrics import METRICS
from restyle_deploy.bench.report import Part, read_report
from restyle_deploy.runtime.session import Session
from tests.bench.made_up import FakeProcesses, failed_part, refuse_files_in
from tests.bench.test_metrics_identity import write_model
from tests.cli.conftest import Run
from tests.pictures import picture, write_bad_files

PROGRAM = "from restyle_deploy.cli.main import main; main()"
QUICK = ("--warmup", 0, "--repeats", 2, "--threads", 1, "--metrics", "mse,psnr_db,ssim")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> FakeProcesses:
    """Stands for the processes that measure."""
    fake = FakeProcesses()
    monkeypatch.setattr("restyle_deploy.bench.schedule.run_job", fake.run_job)
    return fake


def test_what_is_measured_and_chosen_can_be_opened(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ("--steps", "1,2", "--budget-ms", 1e6, "--min-quality", "psnr_db=0", "--load", 0.5, "--load-seconds", 0.2)
    result = run("bench", toy_bundle, photos, "-o", output, *options, *QUICK)
    assert (result.exit_code, result.stderr) == (0, "")
    report = read_report(output / "report.json")
    measured = report.configurations[0]
    assert (measured.status, [row.steps for row in measured.rows], len(measured.load)) == ("ok", [1, 2], 1)
    assert measured.session is not None
    assert (measured.session["backend"], measured.session["threads"]) == ("onnxruntime", 1)
    assert list(measured.rows[0].stages)[0] == "decode"
    assert report.decision is not None
    assert f"\n{report.decision.reason}\n" in result.stdout
    with Session.open(output / "deploy.toml") as session:
        assert session.describe()["threads"] == 1
        images = np.stack([picture(), picture(1)])
        expected = session.invert(images, steps=report.decision.steps)
        np.testing.assert_array_equal(session.invert(images).latents, expected.latents)


def test_approximate_configuration_is_measured_beside_the_exact_one(
    run: Run, toy_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    options = ("--backend", "pytorch", "--precision", "bf16", "--steps", "1")
    result = run("bench", toy_bundle, photos, "-o", tmp_path, *options, *QUICK)
    assert (result.exit_code, result.stderr) == (0, "")
    measured = read_report(tmp_path / "report.json").configurations[0]
    assert measured.exact is not None
    assert (measured.configuration.precision, measured.exact.session["precision"]) == ("bf16", "fp32")
    assert "PSNR to exact (dB)" in result.stdout.splitlines()[0]


def test_ctrl_c_keeps_what_is_finished(toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ["bench", toy_bundle, photos, "-o", tmp_path, "--steps", "1", "--batch", "1,2", *QUICK]
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    second = tmp_path / "cells" / "onnxruntime-cpu-fp32-plain-b2-t1.job"
    while process.poll() is None and not second.exists():
        time.sleep(0.01)
    time.sleep(0.5)  # it has begun to import its libraries
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert re.fullmatch(r"Error: interrupted: 1 of 2 configurations are measured and kept in .* --resume\n", errors)
    report = read_report(tmp_path / "report.json")
    assert [result.status for result in report.configurations] == ["ok", "skipped"]
    assert not second.exists()


def test_table_choice_and_place_are_printed(
    run: Run, processes: FakeProcesses, toy_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    result = run("bench", toy_bundle, photos, "-o", output, "--steps", "1,2", "--batch", "1,2", "--sweep")
    assert (result.exit_code, result.stderr) == (0, "")
    table, reason, place = result.stdout.split("\n\n")
    assert place == f"report, page, charts and strips: {output}\n"
    assert table.splitlines()[0].split()[0] == "configuration"
    assert reason.startswith("onnxruntime-cpu-fp32-plain-b1 with 2 steps: ")
    assert [job.configuration.batch for job in processes.jobs] == [1, 2, 4, 8]
    assert processes.jobs[0].files == tuple(str((photos / name).resolve()) for name in ("a.png", "b.jpg"))


def test_options_reach_the_processes(
    run: Run, processes: FakeProcesses, toy_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "face.onnx").write_bytes(b"model")
    options: list[object] = ["--backend", "openvino,onnxruntime", "--precision", "bf16", "--preview-steps"]
    options += ["--threads", 2, "--repeats", 7, "--warmup", 4, "--strips", 1, "--load", "0.5,12/s,0.9"]
    options += ["--load-seconds", 3]
    options += ["--identity-model", tmp_path / "face.onnx", "--identity-size", 112, 96, "--metrics", "mse,identity"]
    options += ["--time-budget", "2h", "--against", "torch", "--steps", "3,1"]
    assert run("bench", toy_bundle, photos, "-o", tmp_path / "out", *options).exit_code == 0
    assert processes.names == [
        f"{backend}-cpu-bf16-plain-{preview}b1-t2"
        for backend in ("openvino", "onnxruntime")
        for preview in ("", "preview-")
    ]
    job = processes.jobs[0]
    assert (job.steps, job.repeats, job.warmup, job.picture_count) == ((1, 3), 7, 4, 1)
    assert (job.load_shares, job.load_rates, job.load_seconds) == ((0.5, 0.9), (12,), 3)
    assert job.against == "torch"
    options_of_metrics = job.metric_options
    assert options_of_metrics is not None
    assert options_of_metrics.names == ("mse", "identity")
    assert (options_of_metrics.identity_model, options_of_metrics.identity_size) == (tmp_path / "face.onnx", (112, 96))
    assert processes.seconds[0] == pytest.approx(7200, abs=60)


def test_json_is_the_report(run: Run, processes: FakeProcesses, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    result = run("bench", toy_bundle, photos, "-o", tmp_path, "--steps", "2,1", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))


def test_nothing_that_meets_the_limits_is_exit_1(
    run: Run, processes: FakeProcesses, toy_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    result = run("bench", toy_bundle, photos, "-o", tmp_path, "--budget-ms", 0.001)
    assert (result.exit_code, result.stderr) == (1, "")
    assert "\nnothing meets 0.001 ms (95th percentile of a call): the fastest row is " in result.stdout
    assert not (tmp_path / "deploy.toml").exists()


def test_configuration_that_failed_is_exit_1(
    run: Run, processes: FakeProcesses, toy_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    processes.outcomes["openvino-cpu-fp32-plain-b1"] = failed_part
    result = run("bench", toy_bundle, photos, "-o", tmp_path, "--backend", "onnxruntime,openvino")
    assert result.exit_code == 1
    assert "openvino: failed: it needed more memory than there is" in result.stdout


BATCH_FOUR = "onnxruntime-cpu-fp32-plain-b4"


def test_sweep_that_fills_the_memory_is_exit_0(
    run: Run, processes: FakeProcesses, toy_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    processes.images_per_s = {1: 100.0, 2: 190.0}
    processes.outcomes[BATCH_FOUR] = failed_part
    result = run("bench", toy_bundle, photos, "-o", tmp_path, "--sweep")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "\nonnxruntime, batch 2: fills the host: batch 4 needs more memory than there is\n" in result.stdout
    assert "\nonnxruntime, batch 4: failed: it needed more memory than there is\n" in result.stdout


@pytest.mark.parametrize(
    ("options", "reason"),
    [(("--sweep", "--batch", "1,4"), "it needed more memory than there is"), (("--sweep",), "BuildError: a bug")],
)
def test_batch_that_was_asked_for_or_fails_for_another_reason_is_exit_1(
    run: Run,
    processes: FakeProcesses,
    toy_bundle: Path,
    photos: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    reason: str,
) -> None:
    def fail(job: Job, key: str) -> Part:
        part = failed_part(job, key)
        return replace(part, result=replace(part.result, reason=reason))

    processes.images_per_s = {1: 100.0, 2: 190.0}
    processes.outcomes[BATCH_FOUR] = fail
    result = run("bench", toy_bundle, photos, "-o", tmp_path, *options)
    assert (result.exit_code, result.stderr) == (1, "")


def test_sweep_says_that_its_largest_batch_ended_it(
    run: Run, processes: FakeProcesses, toy_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    processes.images_per_s = {batch: 100.0 * batch for batch in (1, 2, 4)}
    result = run("bench", toy_bundle, photos, "-o", tmp_path, "--sweep", "--max-batch", 4)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [job.configuration.batch for job in processes.jobs] == [1, 2, 4]
    assert "onnxruntime, batch 4: the sweep ended here, at its largest batch, " in result.stdout


def test_nothing_measured_is_one_line(
    run: Run, processes: FakeProcesses, toy_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    result = run("bench", toy_bundle, photos, "-o", tmp_path, "--plan", "engine")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(
        r"Error: nothing could be measured: .*the bundle has no engine for it; run: restyle-deploy build .*\n",
        result.stderr,
    )


def test_bad_files_are_named_and_the_others_measured(
    run: Run, processes: FakeProcesses, toy_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    bad = write_bad_files(photos)
    result = run("bench", toy_bundle, photos, "-o", tmp_path / "out", "--steps", "1")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == len(bad)
    assert all(f"Error: {path}: " in result.stderr for path in bad)
    assert read_report(tmp_path / "out" / "report.json").settings.image_names == ("a", "b")
    assert len(processes.jobs[0].files) == 2


def test_no_image_that_can_be_read_is_one_line_more(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bad = write_bad_files(tmp_path / "in")
    result = run("bench", toy_bundle, tmp_path / "in", "-o", tmp_path / "out", *QUICK)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == len(bad) + 1
    assert result.stderr.endswith("Error: no image could be read; nothing was measured\n")
    assert not (tmp_path / "out").exists()


def test_one_image_of_one_colour_is_measured(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (10, 200, 30)).save(tmp_path / "green.png")
    options = ("-o", tmp_path / "out", "--steps", "1,2", "--budget-ms", 1e6)
    result = run("bench", toy_bundle, tmp_path / "green.png", *options, *QUICK)
    assert (result.exit_code, result.stderr) == (0, "")
    report = read_report(tmp_path / "out" / "report.json")
    assert report.configurations[0].rows[0].quality["mse"].low is None
    assert (tmp_path / "out" / "deploy.toml").exists()


def test_folder_that_cannot_be_written_is_one_line(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("bench", toy_bundle, photos, "-o", tmp_path / "file", *QUICK)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*file.*: no folder that can be written to: .*\n", result.stderr)


def test_output_folder_itself_that_cannot_be_written_is_one_line(
    run: Run,
    processes: FakeProcesses,
    toy_bundle: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_files_in(tmp_path / "out", monkeypatch)
    result = run("bench", toy_bundle, photos, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*out: no folder that can be written to: Read-only file system\n", result.stderr)
    assert processes.jobs == []


def test_metric_model_of_the_wrong_shape_is_told_and_the_rest_goes_on(
    run: Run, toy_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "face.onnx", keepdims=1)
    options = ("--warmup", 0, "--repeats", 2, "--threads", 1, "--steps", 1, "--identity-model", model)
    result = run("bench", toy_bundle, photos, "-o", tmp_path / "out", *options, "--metrics", "mse,identity")
    assert (result.exit_code, result.stderr) == (0, "")
    reason = "not a face-embedding model: its first output is [1, 3, 1, 1] for 1 images; expected [1, D], D >= 2"
    assert re.search(rf"Not shown: .*\({re.escape(str(model))}: {re.escape(reason)}", result.stdout)
    report = read_report(tmp_path / "out" / "report.json")
    assert [metric.name for metric in report.metrics if metric.missing is None] == ["mse"]
    (row,) = report.configurations[0].rows
    assert (set(row.quality), len(row.latency.samples_ms)) == ({"mse"}, 2)
    wish = ("--min-quality", "identity=0.5")
    result = run("bench", toy_bundle, photos, "-o", tmp_path / "out", *options, "--metrics", "mse,identity", *wish)
    assert (result.exit_code, result.stderr) == (1, "")
    assert f"nothing was chosen: metric identity was not measured: {model}: not a face-embedding" in result.stdout


@pytest.mark.parametrize(
    ("library", "extra", "options"), [("matplotlib", "bench", ()), ("torch", "export", ("--against", "torch"))]
)
def test_missing_library_is_one_line(
    run: Run,
    toy_bundle: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    extra: str,
    options: tuple[str, ...],
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    result = run("bench", toy_bundle, photos, "-o", tmp_path / "out", *options, *QUICK)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(rf"Error: .*{library}.*pip install 'restyle-deploy\[{extra}\]'\n", result.stderr)
    assert not (tmp_path / "out").exists()


def test_help_names_every_metric(run: Run) -> None:
    text = " ".join(run("bench", "--help").stdout.split())
    assert f"A list of {', '.join(metric.name for metric in METRICS)}; see" in text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--steps", "1,x"), "no list of whole numbers"),
        (("--steps", "1,1"), "given once"),
        (("--batch", "0"), "at least 1"),
        (("--backend", "onnxruntime,tpu"), "'tpu': known are all, onnxruntime"),
        (("--precision", "int8"), "'int8': known are fp32"),
        (("--plan", "fast"), "'fast': known are engine, plain"),
        (("--metrics", "mse,fid"), "no metric 'fid'; there are mse"),
        (("--min-quality", "psnr_db"), "no metric=value such as psnr_db=20"),
        (("--min-quality", "psnr_db=high"), "no metric=value such as psnr_db=20"),
        (("--min-quality", "psnr_db=nan"), "no metric=value such as psnr_db=20"),
        (("--min-quality", "fid=3"), "no metric 'fid'; there are mse"),
        (("--metrics", "mse", "--min-quality", "ssim=0.5"), "--min-quality of ssim, which is not among --metrics"),
        (("--load", "0.5,3"), "each above 0 and at most 2; calls per second are written as 12/s"),
        (("--load", "0.5,0/s"), "a rate such as 12/s is above 0"),
        (("--load", "1e9/s"), "at most 10000 calls per second"),
        (("--load", "nan/s"), "a rate such as 12/s is above 0"),
        (("--load", "ten/s"), "a rate such as 12/s is above 0"),
        (("--load", "0.5,"), "no list of shares"),
        (("--max-batch", "0"), "not in the range"),
        (("--time-budget", "soon"), "no time such as 90, 90s, 15m or 2h"),
        (("--time-budget", "0m"), "no time such as 90, 90s, 15m or 2h"),
        (("--budget-ms", "inf"), "not in the range"),
        (("--against", "tensorflow"), "torch"),
    ],
)
def test_wrong_usage_is_exit_2(
    run: Run, toy_bundle: Path, photos: Path, tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    result = run("bench", toy_bundle, photos, "-o", tmp_path / "out", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert reason in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
