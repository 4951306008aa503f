"""Every instantiation of every kernel compiles for every architecture, without spills. No GPU is needed."""

import re

import pytest

from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.ops.compiler import KernelResources, check_available, compile_kernels
from restyle_deploy.ops.kernels import geometry
from restyle_deploy.ops.kernels.image_launches import IMAGE_INSTANTIATIONS
from restyle_deploy.ops.kernels.launches import INSTANTIATIONS, UPFIRDN2D

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
MOST_STATIC_SHARED_BYTES = 48 * 1024
MOST_REGISTERS = 128  # two blocks of 256 threads find room on a multiprocessor: while one waits, the other works
ALL = {**INSTANTIATIONS, **IMAGE_INSTANTIATIONS}
GENERAL = re.compile(rf"{UPFIRDN2D}<\w+, {geometry.GENERAL}, ")


@pytest.fixture(scope="module", autouse=True)
def compiler_is_here() -> None:
    try:
        check_available()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ALL)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_instantiation_compiles_without_spills(kernel: str, arch: str) -> None:
    resources = compile_kernels(kernel, ALL[kernel], arch=arch).resources
    assert set(resources) == set(ALL[kernel])
    report = "\n".join(f"{expression}: {each}" for expression, each in resources.items() if _exceeds(each))
    assert not report, f"{arch}:\n{report}"


@pytest.mark.slow
def test_what_is_tiled_uses_shared_memory() -> None:
    resources = compile_kernels(UPFIRDN2D, INSTANTIATIONS[UPFIRDN2D], arch="sm_90").resources
    for expression, each in resources.items():
        assert (each.shared_bytes == 0) == bool(GENERAL.match(expression)), (expression, each)


@pytest.mark.parametrize("kernel", INSTANTIATIONS)
def test_ptx_for_plugins_compiles(kernel: str) -> None:
    (expression, *_) = INSTANTIATIONS[kernel]
    compiled = compile_kernels(kernel, [expression], arch="sm_75", format="ptx")
    assert f".entry {compiled.names[expression]}(" in compiled.code.decode()
    assert ".target sm_75" in compiled.code.decode()


def _exceeds(resources: KernelResources) -> bool:
    return (
        resources.registers > MOST_REGISTERS
        or resources.spill_bytes > 0
        or resources.stack_bytes > 0
        or resources.shared_bytes > MOST_STATIC_SHARED_BYTES
    )
