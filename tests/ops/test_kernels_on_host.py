"""The CUDA sources, compiled as C++ and run thread by thread on the host, against the torch reference."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restyle_deploy.ops.kernels.launches import (
    FUSED_BIAS_ACT,
    UPFIRDN2D,
    Config,
    Factor,
    fused_bias_act_expression,
    upfirdn2d_expression,
)
from tests.ops.host_cuda.host_kernels import (
    COMPILERS,
    HERE,
    SANITIZE,
    SOURCES,
    HostKernelError,
    HostLibrary,
    build_libraries,
    build_library,
    find_compiler,
)
from tests.ops.kernel_cases import (
    ALIGNED,
    DTYPES,
    MISALIGNMENTS,
    SKIP_PADS,
    KernelCase,
    Offsets,
    assert_close,
    empty_y,
    fused_bias_act_cases,
    inputs_of,
    launch_of,
    tensors_of,
    upfirdn2d_cases,
)

ALL = Factor(31)
BIAS_AND_ACTIVATION = Factor.BIAS | Factor.ACTIVATION
# What is compiled for the host: the code of a factor does not depend on the type, so one type has most of the subsets.
FACTORS: Mapping[torch.dtype, tuple[Factor, ...]] = {
    torch.float32: (Factor.NONE, ALL, Factor.DEMOD | Factor.NEXT_SCALE, Factor.NOISE | Factor.ACTIVATION),
    torch.float16: (ALL, BIAS_AND_ACTIVATION),
    torch.bfloat16: (ALL, ALL & ~Factor.NEXT_SCALE),
}
SCHEDULES = st.integers(0, 5)

Libraries = Mapping[str, HostLibrary]  # by kernel


@pytest.fixture(scope="module", autouse=True)
def compiler_is_here() -> None:
    if find_compiler() is None:
        pytest.skip(f"no C++ compiler: none of {', '.join(COMPILERS)} is on the PATH")


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """On images this small, threads of torch do nothing but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def libraries() -> Libraries:
    """Every kernel for every type, compiled once and kept between runs."""
    fused_bias_act, upfirdn2d = [], []
    for dtype, channels_last in itertools.product(DTYPES, (False, True)):
        name = str(dtype).removeprefix("torch.")
        for factors in FACTORS[dtype]:
            fused_bias_act.append(fused_bias_act_expression(name, factors, channels_last=channels_last))
            upfirdn2d += [upfirdn2d_expression(name, config, factors, channels_last=channels_last) for config in Config]
    paths = build_libraries([("upfirdn2d.cu", upfirdn2d), ("fused_bias_act.cu", fused_bias_act)])
    return {kernel: HostLibrary(path=path) for kernel, path in zip((UPFIRDN2D, FUSED_BIAS_ACT), paths, strict=True)}


def with_compiled_factors(case: KernelCase) -> KernelCase:
    choices = FACTORS[case.dtype]
    return replace(case, factors=choices[int(case.factors) % len(choices)])


def check(case: KernelCase, library: HostLibrary, *, schedule: int = 0) -> None:
    """Run a case into memory of NaN; the emulator reports every access outside of the tensors."""
    tensors, y = tensors_of(case), empty_y(case)
    library.run(launch_of(case), inputs_of(tensors), y, schedule=schedule)
    assert_close(case, y, tensors)


@settings(max_examples=100)
@given(fused_bias_act_cases().map(with_compiled_factors), SCHEDULES)
def test_fused_bias_act_is_the_reference(libraries: Libraries, case: KernelCase, schedule: int) -> None:
    check(case, libraries[FUSED_BIAS_ACT], schedule=schedule)


@settings(max_examples=100)
@given(upfirdn2d_cases().map(with_compiled_factors), SCHEDULES)
def test_upfirdn2d_is_the_reference(libraries: Libraries, case: KernelCase, schedule: int) -> None:
    check(case, libraries[UPFIRDN2D], schedule=schedule)


@pytest.mark.parametrize("schedule", [0, 1])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("config", [None, *Config])
def test_more_than_one_tile_and_vector(
    libraries: Libraries, config: Config | None, channels_last: bool, schedule: int
) -> None:
    for dtype in DTYPES:
        case = KernelCase(shape=(2, 40, 21, 35), factors=ALL, dtype=dtype, channels_last=channels_last)
        check(filtered(case, config), libraries[kernel_of(config)], schedule=schedule)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_sizes_of_an_up_layer(libraries: Libraries, channels_last: bool) -> None:
    """A transposed convolution gives 2 · size + 1 pixels, so every other row begins at an odd address."""
    case = KernelCase(shape=(1, 8, 129, 129), factors=ALL, dtype=torch.float16, channels_last=channels_last)
    check(filtered(case, Config.BLUR), libraries[UPFIRDN2D])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("config", [None, Config.BLUR])
def test_tensors_are_misaligned_each_in_its_own_way(
    libraries: Libraries, config: Config | None, channels_last: bool
) -> None:
    for dtype, offsets in itertools.product(DTYPES, MISALIGNMENTS):
        base = KernelCase(shape=(1, 16, 4, 8), factors=ALL, dtype=dtype, channels_last=channels_last, offsets=offsets)
        check(filtered(base, config), libraries[kernel_of(config)])


@pytest.mark.parametrize("channels", [1, 3, 15, 18])
@pytest.mark.parametrize("offset", [0, 3])
def test_planes_that_begin_at_all_remainders(libraries: Libraries, channels: int, offset: int) -> None:
    """In groups of one to four planes that are up to eight planes apart, and planes smaller than a vector."""
    for dtype, sides in itertools.product((torch.float16, torch.float32), ((5, 7), (5, 6), (3, 4), (1, 3), (1, 1))):
        offsets = Offsets(x=offset, y=offset)
        case = KernelCase(shape=(3, channels, *sides), factors=ALL, dtype=dtype, offsets=offsets)
        check(case, libraries[FUSED_BIAS_ACT])


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_go_on_where_blocks_are_few(libraries: Libraries, channels_last: bool) -> None:
    case = KernelCase(shape=(3, 20, 9, 16), factors=ALL, dtype=torch.float16, channels_last=channels_last)
    launch = replace(launch_of(case), grid=(1, 1, 1))
    assert launch_of(case).grid[0] > 1
    tensors, y = tensors_of(case), empty_y(case)
    libraries[FUSED_BIAS_ACT].run(launch, inputs_of(tensors), y)
    assert_close(case, y, tensors)


def test_values_beyond_the_type_become_infinite(libraries: Libraries) -> None:
    case = KernelCase(shape=(1, 1, 2, 8), factors=BIAS_AND_ACTIVATION, dtype=torch.float16, gain=4.0)
    tensors, y = tensors_of(case), empty_y(case)
    tensors.x.fill_(60000.0)
    tensors.x[..., 1] = math.nan
    libraries[FUSED_BIAS_ACT].run(launch_of(case), inputs_of(tensors), y)
    assert y[..., 1].isnan().all()
    assert (y[..., ::2] == math.inf).all()


def filtered(case: KernelCase, config: Config | None) -> KernelCase:
    """Return the case with a filter before what it does."""
    if config is None:
        return case
    if config is Config.GENERAL:
        return replace(case, config=config, up=3, down=2, pads=(2, -1, 3, 1), filter_size=(3, 5))
    up, pads = (2, SKIP_PADS) if config is Config.SKIP_UPSAMPLE else (1, (1, 1, 1, 1))
    return replace(case, config=config, up=up, pads=pads, filter_size=(4, 4))


def kernel_of(config: Config | None) -> str:
    return FUSED_BIAS_ACT if config is None else UPFIRDN2D


# For the sanitizer: both layouts of what is tiled, both sizes of an element, vectors and single channels.
SAMPLE = KernelCase(shape=(1, 9, 37, 67), dtype=torch.float16, factors=ALL)
SAMPLES = [
    filtered(replace(SAMPLE, channels_last=channels_last), config)
    for config in (Config.BLUR, Config.SKIP_UPSAMPLE)
    for channels_last in (False, True)
]
SAMPLES += [replace(case, shape=(1, 16, 37, 35)) for case in SAMPLES if case.channels_last]
SAMPLES.append(replace(SAMPLES[0], dtype=torch.float32))

PLANES, WALK, SHARED_FILTERING = "filtering_planes.cuh", "filtering_channels_last.cuh", "filtering.cuh"
# What is wrong: the file, the text (all of it goes), what stands there instead, whether channels are last.
MISTAKES = {
    "no barrier before a tile is read": (PLANES, "__syncthreads();", "", False),
    "a tile is not waited for": (PLANES, "wait_for_copies<0>();", "", False),
    "a row reads its neighbour": (PLANES, "tile.clear_edges()", "false", False),
    "no barrier before a buffer is filled again": (
        WALK,
        "        }\n        __syncthreads();\n    }",
        "        }\n    }",
        True,
    ),
    "the latest rows are not waited for": (WALK, "wait_for_copies<1>", "wait_for_copies<2>", True),
    "the filter is not flipped": (SHARED_FILTERING, "flipped * TAPS", "thread % TAPS * TAPS", True),
}


def build_changed(
    folder: Path, source: str, expressions: Sequence[str], *, file: str, text: str, replacement: str
) -> HostLibrary:
    """Compile a copy of the sources in which a text is another one."""
    for path in SOURCES.glob("*.cu*"):
        shutil.copy(path, folder)
    content = (SOURCES / file).read_text(encoding="utf-8")
    assert text in content
    (folder / file).write_text(content.replace(text, replacement), encoding="utf-8")
    return HostLibrary(path=build_library(source, expressions, folder=folder))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_kernel_is_found(mistake: str, tmp_path: Path) -> None:
    file, text, replacement, channels_last = MISTAKES[mistake]
    base = KernelCase(shape=(1, 8, 40, 33), factors=ALL, dtype=torch.float16, channels_last=channels_last)
    case = filtered(base, Config.BLUR)
    expressions = [launch_of(case).expression]
    library = build_changed(tmp_path, "upfirdn2d.cu", expressions, file=file, text=text, replacement=replacement)
    found = 0
    for schedule in range(3):
        try:
            check(case, library, schedule=schedule)
        except (AssertionError, HostKernelError):
            found += 1
    assert found > 0


FUSED = "fused_bias_act.cu"
# What is wrong in it: the text, what stands there instead, the case.
ODD_PLANES = KernelCase(shape=(3, 18, 5, 7), factors=ALL, dtype=torch.float16)
VECTORS = replace(ODD_PLANES, shape=(1, 16, 4, 8))
FUSED_MISTAKES = {
    "factors are taken for aligned": (
        " && inputs.template factors_are_aligned<FACTORS>()",
        "",
        replace(VECTORS, channels_last=True, offsets=Offsets(bias=1)),
    ),
    "noise is taken for aligned": (
        "if (is_aligned(address, ",
        "if (true || (",
        replace(VECTORS, offsets=Offsets(noise=1)),
    ),
    "planes of an item begin at other pixels": ("% COUNT != 0) {", "% 1 != 0) {", ODD_PLANES),
}


@pytest.mark.parametrize("mistake", FUSED_MISTAKES)
def test_a_mistake_in_fused_bias_act_is_found(mistake: str, tmp_path: Path) -> None:
    text, replacement, case = FUSED_MISTAKES[mistake]
    expressions = [launch_of(case).expression]
    library = build_changed(tmp_path, FUSED, expressions, file=FUSED, text=text, replacement=replacement)
    with pytest.raises((AssertionError, HostKernelError)):
        check(case, library)


@pytest.fixture(scope="module")
def width_writer(tmp_path_factory: pytest.TempPathFactory) -> HostLibrary:
    """`fused_bias_act` that stores, instead of each result, of how many bytes the access is that stores it."""
    text = "__stwb(reinterpret_cast<typename Pack<T, COUNT>::Word*>(address), pack.word);"
    replacement = "for (int i = 0; i < COUNT; ++i) __stwb(address + i, __float2half_rn(sizeof(pack.word)));"
    expressions = [fused_bias_act_expression("float16", ALL, channels_last=last) for last in (False, True)]
    folder = tmp_path_factory.mktemp("width")
    return build_changed(folder, FUSED, expressions, file="common.cuh", text=text, replacement=replacement)


@pytest.mark.parametrize(
    ("shape", "channels_last", "offsets", "narrow", "narrow_bytes"),
    [
        ((2, 3, 4, 4), False, ALIGNED, 0, 2),
        ((2, 3, 4, 4), False, Offsets(noise=1, demod=1, bias=1, next_scale=1), 0, 2),
        # Of 16 pixels, 5 before one vector and 3 behind it.
        ((2, 3, 4, 4), False, Offsets(x=3, y=3), 6 * 8, 2),
        # Of 35, 3 are outside of 4 vectors, or 11 of 3, where there are 3, 4, 5 or 7 before the first one.
        ((1, 8, 5, 7), False, ALIGNED, 4 * 3 + 4 * 11, 2),
        ((2, 3, 4, 4), False, Offsets(x=2, y=4), 6 * 16, 4),
        ((1, 8, 5, 7), False, Offsets(x=1, y=2), 8 * 35, 2),
        ((1, 16, 5, 7), True, Offsets(noise=1), 0, 2),
        ((1, 16, 5, 7), True, Offsets(bias=1), 16 * 35, 4),
        ((1, 6, 5, 7), True, ALIGNED, 6 * 35, 4),
        ((1, 5, 5, 7), True, ALIGNED, 5 * 35, 2),
        ((1, 16, 5, 7), True, Offsets(x=1), 16 * 35, 2),
    ],
)
def test_how_wide_accesses_are(
    width_writer: HostLibrary,
    shape: tuple[int, int, int, int],
    channels_last: bool,
    offsets: Offsets,
    narrow: int,
    narrow_bytes: int,
) -> None:
    case = KernelCase(shape=shape, factors=ALL, dtype=torch.float16, channels_last=channels_last, offsets=offsets)
    y = empty_y(case)
    width_writer.run(launch_of(case), inputs_of(tensors_of(case)), y)
    assert int((y == 16).sum()) == y.numel() - narrow
    assert int((y == narrow_bytes).sum()) == narrow


@pytest.fixture(scope="module")
def probes() -> HostLibrary:
    return HostLibrary(path=build_probes())


def build_probes(extra_flags: Sequence[str] = ()) -> Path:
    types = ("__half", "__nv_bfloat16")
    expressions = [f"{kernel}<{name}>" for kernel in ("widen", "narrow") for name in types]
    expressions += [f"rotate<{mistake}>" for mistake in range(7)]
    expressions += ["rotate_by_copies<true>", "rotate_by_copies<false>"]
    return build_library("probes.cu", expressions, folder=HERE, extra_flags=[f"-I{SOURCES}", *extra_flags])


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "__half"), (torch.bfloat16, "__nv_bfloat16")])
def test_the_emulator_converts_as_pytorch_does(probes: HostLibrary, dtype: torch.dtype, name: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(every.shape)
    probes.launch(f"widen<{name}>", (every, every.numel(), wide), grid=(256, 1, 1), block=(256, 1, 1))
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    # The numbers half way between two neighbours, and those next to these.
    positive = wide[2**15 :][wide[2**15 :].isfinite()]
    middle = (positive[:-1] + positive[1:]) / 2
    up, down = middle.nextafter(torch.tensor(math.inf)), middle.nextafter(torch.tensor(-math.inf))
    special = torch.tensor([math.inf, math.nan, 65519.0, 65520.0, 3.4e38, 1e-45, 2.0**-25, 0.0])
    values = torch.cat([positive[:1], middle, up, down, special])
    values = torch.cat([values, -values])
    narrow = torch.empty(values.shape, dtype=dtype)
    probes.launch(f"narrow<{name}>", (values, values.numel(), narrow), grid=(512, 1, 1), block=(256, 1, 1))
    torch.testing.assert_close(narrow, values.to(dtype), rtol=0, atol=0, equal_nan=True)


def rotate(probes: HostLibrary, kernel: str, *, schedule: int = 0) -> bool:
    """Whether `kernel` rotates 32 values."""
    x, y = torch.arange(32.0), torch.full((32,), math.nan)
    probes.launch(kernel, (x, y), grid=(1, 1, 1), block=(32, 1, 1), schedule=schedule)
    return torch.equal(y, x.roll(-1))


@pytest.mark.parametrize("schedule", range(4))
@pytest.mark.parametrize("kernel", ["rotate<0>", "rotate_by_copies<true>"])
def test_the_emulator_runs_what_is_right(probes: HostLibrary, kernel: str, schedule: int) -> None:
    assert rotate(probes, kernel, schedule=schedule)


def test_the_emulator_shows_what_is_unordered(probes: HostLibrary) -> None:
    assert not all(rotate(probes, "rotate<1>", schedule=schedule) for schedule in (0, 1))
    assert not rotate(probes, "rotate_by_copies<false>", schedule=0)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("rotate<2>", "a barrier reached by some threads only"),
        ("rotate<3>", r"write out of bounds: 4 bytes .* block \(0, 0, 0\), thread \(31, 0, 0\)"),
        ("rotate<4>", "write out of bounds"),
        ("rotate<5>", "misaligned write: 16 bytes"),
        ("rotate<9>", "no such kernel"),
    ],
)
def test_the_emulator_reports_what_is_wrong(probes: HostLibrary, kernel: str, message: str) -> None:
    with pytest.raises(HostKernelError, match=message):
        rotate(probes, kernel)


SANITIZED = """
from pathlib import Path
from tests.ops import test_kernels_on_host as tests
tests.run_samples(Path({library!r}), planted={planted})
"""


@pytest.mark.parametrize("planted", [False, True])
def test_the_sanitizer_finds_planted_mistakes_only(project_root: Path, *, planted: bool) -> None:
    """What the emulator does not see: accesses outside of arrays in shared memory, and misaligned ones there."""
    if planted:
        library = build_probes(SANITIZE)
    else:
        expressions = list(dict.fromkeys(launch_of(case).expression for case in SAMPLES))
        library = build_library("upfirdn2d.cu", expressions, extra_flags=SANITIZE)
    result = subprocess.run(
        [sys.executable, "-c", SANITIZED.format(library=str(library), planted=planted)],
        cwd=project_root,
        env={**os.environ, "PYTHONPATH": str(project_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    if planted:
        assert result.returncode != 0
        assert "runtime error: index 32 out of bounds" in result.stderr
    else:
        assert result.returncode == 0, result.stderr


def run_samples(library: Path, *, planted: bool) -> None:
    """Run some cases, or one that is wrong, in a process that ends at the first undefined behaviour."""
    if planted:
        rotate(HostLibrary(path=library), "rotate<6>")
        return
    for case in SAMPLES:
        check(case, HostLibrary(path=library))
