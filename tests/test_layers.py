"""Who imports whom: one direction, and one file that talks to CUDA."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "restyle_deploy"
CUDA_FILE = Path("runtime/device.py")
# NVRTC compiles without a device.
COMPILER_FILES = {Path("ops/compiler.py"), Path("ops/cuda_versions.py")}
COMPILER_MODULES = ("cuda.bindings.nvrtc", "cuda.pathfinder")
CUDA_LIBRARIES = {"cuda", "cupy", "pycuda", "numba"}
# From the beginning to the end; a package imports from no later one. What CUDA is asked stands beside all of them.
STAGES = ("ops", "models", "graph", "backends", "runtime", "bench", "cli")


def imported(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports anywhere, with the names it takes of them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def test_one_file_talks_to_cuda() -> None:
    talking = {
        path
        for path in files()
        for name in imported(PACKAGE / path)
        if name.partition(".")[0] in CUDA_LIBRARIES
        and not (path in COMPILER_FILES and name.startswith(COMPILER_MODULES))
    }
    assert talking == {CUDA_FILE}


def test_that_file_needs_nothing_but_errors() -> None:
    tree = ast.parse((PACKAGE / CUDA_FILE).read_text(encoding="utf-8"))
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name and name.startswith("restyle_deploy")} == {"restyle_deploy.errors"}


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_from_a_later_one(stage: str) -> None:
    later = set(STAGES[STAGES.index(stage) + 1 :])
    wrong = {
        f"{path} imports {name}"
        for path in files()
        if path.parts[0] == stage
        for name in imported(PACKAGE / path)
        if stage_of(name) in later and name.split(".")[:3] != ["restyle_deploy", *CUDA_FILE.with_suffix("").parts]
    }
    assert wrong == set()


def stage_of(name: str) -> str | None:
    """Return the stage of a module of the package; None for others."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == PACKAGE.name else None
