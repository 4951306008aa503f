import platform
from pathlib import Path

import pytest

from restyle_deploy import processor
from restyle_deploy.processor import describe_processor, read_instruction_sets, read_model_name

X86 = (
    "processor\t: 0\nmodel\t\t: 1\nmodel name\t: Good CPU @ 2 GHz: fast\nflags\t\t: fpu sse fma avx2 avx512f_like\n"
    "\nprocessor\t: 1\nmodel name\t: other\nflags\t\t: avx512f\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16 sve\nCPU part\t: 0xd40\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The list that is read; absent until a test writes it."""
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


def test_name_and_instruction_sets_are_those_of_the_first_processor(cpuinfo: Path) -> None:
    cpuinfo.write_text(X86)
    assert describe_processor() == "Good CPU @ 2 GHz: fast (avx2, fma)"


def test_list_without_a_name_gives_the_platforms(cpuinfo: Path) -> None:
    cpuinfo.write_text(ARM)
    assert read_model_name() == (platform.processor() or platform.machine())
    assert read_instruction_sets() == ("asimd", "bf16", "sve")


@pytest.mark.parametrize("content", [None, "", "no list", "\xff"])
def test_without_a_list_there_is_a_name(cpuinfo: Path, content: str | None) -> None:
    if content is not None:
        cpuinfo.write_bytes(content.encode("latin-1"))
    assert describe_processor() == (platform.processor() or platform.machine())


def test_this_machine_is_described_alike_each_time() -> None:
    assert describe_processor() == describe_processor() != ""
