import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import restyle_deploy.build
import restyle_deploy.verify
from restyle_deploy import gpu_checks, gpu_engine_checks, gpu_kernel_checks
from restyle_deploy.backends.tensorrt_library import TENSORRT, TENSORRT_RTX
from restyle_deploy.build import BuildOptions, build_engine
from restyle_deploy.cli.doctor import doctor
from restyle_deploy.errors import BackendUnavailableError, BuildError, VerificationError
from restyle_deploy.gpu_checks import Gpu, run_gpu_checks
from restyle_deploy.ops import compiler
from restyle_deploy.ops.kernels.image_launches import IMAGE_INSTANTIATIONS
from restyle_deploy.ops.kernels.launches import INSTANTIATIONS
from restyle_deploy.runtime.session import Session
from restyle_deploy.verify import Parity
from tests.backends.host_driver.stand_in import HostDriver

DEMO = Path("engines/demo-faces")
GPU = Gpu(name="Toy GPU", arch="sm_90", driver="13.0")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there is a GPU, for which every kernel compiles without a spill."""
    monkeypatch.setattr(gpu_checks, "_find_gpu", lambda: GPU)
    monkeypatch.setattr(compiler, "compile_kernels", compiled_with(spill_bytes=0))
    for check in ("check_images", "check_loop", "check_memory", "check_sanitizer"):
        monkeypatch.setattr(gpu_checks, check, functools.partial(find_nothing, check))


def find_nothing(check: str, *arguments: Any, **options: Any) -> str:
    """Stand for a check of the loop, which other tests run."""
    return " ".join([check, *map(str, (*arguments, *options.values()))])


def compiled_with(*, spill_bytes: int) -> Callable[..., Any]:
    def compile_kernels(kernel: str, expressions: tuple[str, ...], *, arch: str) -> Any:
        assert arch == GPU.arch
        resources = SimpleNamespace(spill_bytes=spill_bytes)
        return SimpleNamespace(resources=dict.fromkeys(expressions, resources))

    return compile_kernels


@dataclass
class Build:
    """What `build_engine` and `verify_bundle` do, and which engines they were asked for."""

    facts: dict[str, Any]
    error: Exception | None = None
    error_of: tuple[str, ...] = ("fp16",)
    latent_error: float = 1e-6
    built: list[tuple[Any, Path]] = field(default_factory=list)

    def build_engine(self, bundle: Path, options: Any) -> Any:
        assert (bundle / "manifest.json").is_file()
        self.built.append((options, bundle))
        if self.error is not None and options.precision in self.error_of:
            raise self.error
        return SimpleNamespace(build=self.facts)

    def verify_bundle(self, bundle: Path, **options: Any) -> Parity:
        assert bundle == self.built[-1][1]
        return Parity(latent_errors=(self.latent_error,), image_errors=(0.0,), precision=options["precision"])


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """Let engines be built and verified by the returned object, whatever the library."""
    made = Build(facts={"verified": True, "plugin_route": "aot"})
    options = {"tensorrt": TENSORRT.options, "tensorrt-rtx": TENSORRT_RTX.options}
    monkeypatch.setattr(gpu_engine_checks, "load_backend", lambda name: SimpleNamespace(ENGINE_OPTIONS=options[name]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(restyle_deploy.build, "build_engine", made.build_engine)
    monkeypatch.setattr(restyle_deploy.verify, "verify_bundle", made.verify_bundle)
    for check in ("_check_batches", "_check_caches"):  # which run the engine: see below
        monkeypatch.setattr(gpu_engine_checks, check, lambda copy, options: "toy")
    return made


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> Gpu:
        raise BackendUnavailableError("no NVIDIA GPU can be used here: toy")

    monkeypatch.setattr(gpu_checks, "_find_gpu", find)
    with pytest.raises(BackendUnavailableError, match="no NVIDIA GPU can be used here"):
        run_gpu_checks(None)


def test_finding_a_gpu_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "find_devices", lambda: ((), "there is no NVIDIA driver"))
    with pytest.raises(BackendUnavailableError, match="no NVIDIA GPU can be used here: there is no NVIDIA driver"):
        run_gpu_checks(None)


def test_the_first_gpu_is_found(host_driver: HostDriver) -> None:
    """By the real cuda-core, on a stand-in for the driver."""
    script = "from restyle_deploy import gpu_checks; print(gpu_checks._find_gpu())"
    output = host_driver.run(script).output
    assert re.fullmatch(r"Gpu\(name='Host stand-in', arch='sm_89', driver='\d+\.\d+'\)\n", output)


@pytest.mark.usefixtures("gpu")
def test_what_lacks_something_is_not_run_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: list[str] = []
    report = run_gpu_checks(None, progress=names.append)
    assert names == list(report.outcomes)
    count = sum(len(expressions) for expressions in (*INSTANTIATIONS.values(), *IMAGE_INSTANTIATIONS.values()))
    assert report.outcomes["kernels compile"].detail == f"{count} instantiations, none with spilled registers"
    assert report.outcomes["kernels compile"].status == "passed"
    assert report.outcomes["kernels agree with torch"].status == "not run"
    assert "sees no GPU" in report.outcomes["kernels agree with torch"].detail
    for name in ("loop of pytorch", "loop of onnxruntime", "memory comes back", "tensorrt", "tensorrt-rtx"):
        assert (report.outcomes[name].status, report.outcomes[name].detail) == ("not run", "no bundle was named")
    assert report.is_sound


@pytest.mark.usefixtures("gpu", "build")
def test_the_loop_is_tried_on_the_gpu() -> None:
    outcomes = run_gpu_checks(DEMO).outcomes
    assert outcomes["images agree with Pillow"].detail == "check_images cuda:0"
    assert outcomes["loop of pytorch"].detail == f"check_loop {DEMO} pytorch cuda:0"
    assert outcomes["loop of onnxruntime"].detail == f"check_loop {DEMO} onnxruntime cuda:0"
    assert outcomes["memory comes back"].detail == f"check_memory {DEMO} pytorch cuda:0"


@pytest.mark.usefixtures("gpu")
def test_images_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_kernels = compiled_with(spill_bytes=0)

    def noted(kernel: str, expressions: tuple[str, ...], *, arch: str) -> Any:
        compiled.append(kernel)
        return compile_kernels(kernel, expressions, arch=arch)

    monkeypatch.setattr(compiler, "compile_kernels", noted)
    run_gpu_checks(None)
    assert compiled == [*INSTANTIATIONS, *IMAGE_INSTANTIATIONS]


@pytest.mark.usefixtures("gpu")
def test_spills_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost speed, and depend on the compiler."""
    monkeypatch.setattr(compiler, "compile_kernels", compiled_with(spill_bytes=8))
    outcome = run_gpu_checks(None).outcomes["kernels compile"]
    assert re.fullmatch(r"(\d+) instantiations, \1 with spilled registers", outcome.detail)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("is_wrong", [False, True])
def test_kernels_are_compared_with_torch(monkeypatch: pytest.MonkeyPatch, is_wrong: bool) -> None:
    """On the CPU, where our operators are the reference, in float32, rounded to the type of the images."""
    from restyle_deploy.ops import cuda_ops

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_kernel_checks, "DEVICE", "cpu")
    if is_wrong:
        exact = cuda_ops.upfirdn2d_epilogue
        monkeypatch.setattr(cuda_ops, "upfirdn2d_epilogue", lambda *args, **kwargs: 1.01 * exact(*args, **kwargs))
    outcome = run_gpu_checks(None).outcomes["kernels agree with torch"]
    assert outcome.status == ("failed" if is_wrong else "passed")
    assert "float32: the error is" in outcome.detail if is_wrong else "bfloat16 within" in outcome.detail


@pytest.mark.usefixtures("gpu")
def test_engines_are_built_from_a_copy_and_opened_again(build: Build) -> None:
    report = run_gpu_checks(DEMO)
    asked = [
        (options.backend, options.precision, options.engine.given, options.plugin_route) for options, _ in build.built
    ]
    each = [(precision, engine.given, route) for precision, engine, route in gpu_engine_checks.WAYS.values()]
    of_rtx = [one for one in each if not {"hardware_compatible", "version_compatible"} & set(one[1])]
    assert asked == [*(("tensorrt", *one) for one in each), *(("tensorrt-rtx", *one) for one in of_rtx)]
    assert all(path != DEMO and not path.exists() for _, path in build.built)
    assert {options.device for options, _ in build.built} == {"cuda:0"}
    detail = report.outcomes["tensorrt"].detail
    assert detail.startswith("fp32 passed: kernels: aot, latents within 1.0e-06; ")
    assert detail.endswith("; batches passed: toy; caches passed: toy")
    assert report.is_sound


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_is_not_verified_fails(build: Build) -> None:
    build.facts = {"verified": False, "reason": "toy"}
    outcome = run_gpu_checks(DEMO).outcomes["tensorrt"]
    assert (outcome.status, "fp16 failed: built, not verified: toy" in outcome.detail) == ("failed", True)


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_is_wrong_when_opened_again_fails(build: Build) -> None:
    build.latent_error = 1.0
    assert "the engine, opened again: differs" in run_gpu_checks(DEMO).outcomes["tensorrt"].detail


@pytest.mark.usefixtures("gpu")
def test_what_this_gpu_lacks_is_not_a_failure(build: Build) -> None:
    build.error = BackendUnavailableError("no fp16 here")
    outcome = run_gpu_checks(DEMO).outcomes["tensorrt"]
    assert (outcome.status, "fp16 stripped not run: no fp16 here" in outcome.detail) == ("passed", True)


@pytest.mark.usefixtures("gpu")
def test_a_library_that_cannot_build_for_this_gpu_is_not_run(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    build.error = BackendUnavailableError("not for sm_90")
    monkeypatch.setattr(gpu_engine_checks, "WAYS", {"fp16": gpu_engine_checks.WAYS["fp16"]})
    for check in ("_check_batches", "_check_caches"):
        monkeypatch.setattr(gpu_engine_checks, check, gpu_engine_checks._build_and_verify)
    build.error_of = ("fp16", "fp32")
    outcome = run_gpu_checks(DEMO).outcomes["tensorrt-rtx"]
    assert (outcome.status, outcome.detail) == (
        "not run",
        "; ".join(f"{name} not run: not for sm_90" for name in ("fp16", "batches", "caches")),
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("error", "detail"), [(BuildError("toy refuses"), "toy refuses"), (OSError("toy"), "OSError: toy")]
)
def test_an_error_is_an_outcome(monkeypatch: pytest.MonkeyPatch, error: Exception, detail: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(compiler, "compile_kernels", fail)
    outcome = run_gpu_checks(None).outcomes["kernels compile"]
    assert (outcome.status, outcome.detail) == ("failed", detail)


@pytest.mark.usefixtures("gpu")
def test_command_prints_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(doctor, ["--gpu"])
    assert result.exit_code == 0
    row = result.stdout.splitlines()[-1]
    assert row.startswith("| Toy GPU, sm_90, CUDA driver 13.0 | ")
    header = next(
        line for line in Path("docs/gpu.md").read_text(encoding="utf-8").splitlines() if line.startswith("| device")
    )
    assert row.count("|") == header.count("|")
    as_json = json.loads(CliRunner().invoke(doctor, ["--gpu", "--json"]).stdout)
    columns = [cell.strip() for cell in header.split("|")[4:-1]]
    assert columns == list(as_json["outcomes"])
    assert as_json["gpu"] == {"name": "Toy GPU", "arch": "sm_90", "driver": "13.0"}


@pytest.mark.usefixtures("gpu")
def test_command_exits_with_1_where_a_check_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise BuildError("toy refuses")

    monkeypatch.setattr(compiler, "compile_kernels", fail)
    assert CliRunner().invoke(doctor, ["--gpu"]).exit_code == 1


def test_a_bundle_without_gpu_is_wrong_usage(tmp_path: Path) -> None:
    result = CliRunner().invoke(doctor, ["--bundle", str(tmp_path)])
    assert (result.exit_code, "--bundle goes with --gpu" in result.output) == (2, True)


# Kernels in a graph, and under compute-sanitizer


@pytest.mark.parametrize("is_replayed", [True, False])
def test_kernels_are_replayed_on_other_images(monkeypatch: pytest.MonkeyPatch, is_replayed: bool) -> None:
    """On the CPU, with a stand-in for the recording."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_kernel_checks, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_kernel_checks, "_capture", lambda run: run if is_replayed else lambda: None)
    if is_replayed:
        assert gpu_kernel_checks.capture_kernels() == "4 kernels replayed on other images: the same bits"
        return
    with pytest.raises(VerificationError, match="a replay gives other results than a call: no filter"):
        gpu_kernel_checks.capture_kernels()


def test_filters_are_made_before_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to the device is refused while a graph is recorded, and a new filter cannot be read then."""
    from restyle_deploy.ops import cuda_ops

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_kernel_checks, "DEVICE", "cpu")
    filters: dict[int, torch.Tensor] = {}
    apply = cuda_ops.upfirdn2d_epilogue

    def noted(image: torch.Tensor, kernel: torch.Tensor, **factors: Any) -> torch.Tensor:
        filters[id(kernel)] = kernel
        return apply(image, kernel, **factors)

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        with monkeypatch.context() as patch:
            patch.setattr(gpu_kernel_checks, "_filter", None)
            run()
        return run

    monkeypatch.setattr(cuda_ops, "upfirdn2d_epilogue", noted)
    monkeypatch.setattr(gpu_kernel_checks, "_capture", capture)
    gpu_kernel_checks.capture_kernels()
    assert len(filters) == len(gpu_kernel_checks.CASES) - 1


TRACEBACK = "printf '%s\\n' 'Traceback (most recent call last):' '  File one'"
SANITIZER = """#!/bin/sh
echo "$2" >> "{notes}"
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 3
{action}
"""


@pytest.fixture
def sanitizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Make a compute-sanitizer that does something; return where it notes the tools."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(action: str) -> Path:
        program, notes = tmp_path / "compute-sanitizer", tmp_path / "notes"
        program.write_text(SANITIZER.format(notes=notes, action=action), encoding="utf-8")
        program.chmod(0o755)
        return notes

    return make


def test_all_tools_of_the_sanitizer_run(sanitizer: Callable[[str], Path]) -> None:
    notes = sanitizer("exit 0")
    assert gpu_kernel_checks.check_sanitizer() == "memcheck, racecheck, synccheck, initcheck find nothing"
    assert notes.read_text(encoding="utf-8").split() == list(gpu_kernel_checks.SANITIZER_TOOLS)


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        ("echo '========= Invalid __global__ read'; exit 86", VerificationError, "memcheck: Invalid __global__ read"),
        (f"{TRACEBACK} 'errors.VerificationError: wrong' >&2; exit 1", VerificationError, "memcheck: .*: wrong"),
        (f"{TRACEBACK} 'BackendUnavailableError: no GPU'; exit 1", BackendUnavailableError, "memcheck: .*: no GPU"),
        ("echo '========= Error: mismatch'; exit 1", BackendUnavailableError, "status 1: Error: mismatch"),
        ("echo 'no injection library' >&2; exit 255", BackendUnavailableError, "status 255: no injection library"),
        ("exit 3", BackendUnavailableError, "memcheck ends with exit status 3: it said nothing"),
        ("echo 'Error: Device not supported'; exit 1", BackendUnavailableError, "says: Device not supported"),
        ("exec sleep 5", VerificationError, "memcheck: it does not end within 0.1 s"),
    ],
)
def test_what_the_sanitizer_finds_is_told(
    sanitizer: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    error: type[Exception],
    message: str,
) -> None:
    sanitizer(action)
    if "sleep" in action:
        monkeypatch.setattr(gpu_kernel_checks, "SANITIZER_SECONDS", 0.1)
    with pytest.raises(error, match=message):
        gpu_kernel_checks.check_sanitizer()


def test_no_sanitizer_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_kernel_checks, "SANITIZER_PLACES", (str(tmp_path),))
    with pytest.raises(BackendUnavailableError, match="compute-sanitizer is neither on the PATH nor in"):
        gpu_kernel_checks.check_sanitizer()


# Batches and caches of an engine, tried on ONNX Runtime on the CPU


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, toy_bundle: Path, tmp_path: Path) -> Path:
    monkeypatch.setattr(gpu_engine_checks, "DEVICE", "cpu")
    return Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))


def test_batches_split_in_two_ways_agree(on_cpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BuildOptions(backend="onnxruntime")
    found = gpu_engine_checks._check_batches(on_cpu, options=options)
    assert re.fullmatch(r"of 2 to 4: 5 images split in two ways, latents within \d\.\de[-+]\d\d", found)
    invert = Session.invert

    def invert_wrongly(session: Session, images: Any, *, max_batch: int | None = None, **options: Any) -> Any:
        result = invert(session, images, **options)
        return result if max_batch is None else SimpleNamespace(latents=result.latents + max_batch)

    monkeypatch.setattr(Session, "invert", invert_wrongly)
    with pytest.raises(VerificationError, match=r"5 images as 4 and 1, and as 2, 2 and 1: latents differ by 2"):
        gpu_engine_checks._check_batches(on_cpu, options=options)


@pytest.mark.parametrize("keeps", ["nothing", "the same", "something else"])
def test_caches_are_used_again(on_cpu: Path, monkeypatch: pytest.MonkeyPatch, keeps: str) -> None:
    engine = on_cpu / "engines" / "toy"
    opened: list[Path] = []

    def keep(bundle: Path, *_: Any) -> None:
        opened.append(bundle)
        if keeps != "nothing":
            engine.mkdir(parents=True, exist_ok=True)
            content = f"kep{len(opened)}".encode() if keeps == "the same" else b"more" * len(opened)
            (engine / "generator.runtime.cache").write_bytes(content)
            (engine.parent / "timing-toy.cache").write_bytes(b"measured")

    monkeypatch.setattr(restyle_deploy.build, "build_engine", keep)
    monkeypatch.setattr(gpu_engine_checks, "_run_once", keep)
    if keeps == "the same":
        found = gpu_engine_checks._check_caches(on_cpu, options=BuildOptions(backend="onnxruntime"))
        assert found.startswith("timing-toy.cache 8 bytes, generator.runtime.cache 4 bytes; build 0.0 s, again")
        assert len(opened) == 4
        return
    message = {"nothing": "has kept nothing for the next one", "something else": "has made its cache anew"}[keeps]
    with pytest.raises(VerificationError, match=message):
        gpu_engine_checks._check_caches(on_cpu, options=BuildOptions(backend="onnxruntime"))


def test_engine_is_opened_and_run(on_cpu: Path) -> None:
    build_engine(on_cpu, BuildOptions(backend="onnxruntime"))
    gpu_engine_checks._run_once(on_cpu, "onnxruntime")
