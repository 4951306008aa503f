"""Files and directories that appear under their final name only once they are complete, and the hash of a file."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_when_complete(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; rename it to `path` on success, remove it after an error.

    The temporary name is hidden and has the suffix of `path`, so that writers which go by the suffix behave alike.
    Missing parent folders are created; a file that exists is replaced; a link is followed.

    Raises:
        OSError: the folder or the file cannot be written, or nothing was written under the temporary name.
    """
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden_sibling(target, target.suffix)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_directory_when_complete(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new directory next to `path`; rename it to `path` on success, remove it with its content after an error.

    Args:
        path: the final name; missing parent folders are created; a link is followed.
        overwrite: replace what is there. It is moved aside first, and comes back if the new directory cannot take its
            place. The caller decides whether it may be lost.
    Raises:
        FileExistsError: `path` exists and `overwrite` is false; checked first and once more before the renaming.
        OSError: the directory cannot be written.
    """
    target = path.resolve()
    _check_replaceable(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden_sibling(target)
    temporary.mkdir()
    try:
        yield temporary
        _check_replaceable(target, overwrite)
        _rename_directory(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file; it is read in blocks, never as a whole."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hidden_sibling(target: Path, suffix: str = "") -> Path:
    return target.with_name(f".{secrets.token_hex(8)}.part{suffix}")


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if target.is_dir() and overwrite:
        return
    if target.exists():
        raise FileExistsError(errno.EEXIST, "exists already and is not replaced", str(target))


def _rename_directory(source: Path, target: Path) -> None:
    if not target.exists():
        os.rename(source, target)
        return
    old = _hidden_sibling(target)
    os.rename(target, old)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
