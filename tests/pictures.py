"""Image files for tests: good ones, and each kind of bad one."""

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def picture(seed: int = 0, height: int = 40, width: int = 50) -> NDArray[np.uint8]:
    """Return a smooth image, another for each seed: uint8 [height, width, 3]."""
    pattern = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return np.array(Image.fromarray(pattern).resize((width, height), Image.Resampling.BICUBIC))


def write_picture(path: Path, seed: int = 0) -> Path:
    """Write a picture in the format of the extension (PNG without one); return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path, format=None if path.suffix else "PNG")
    return path


def write_bad_files(folder: Path) -> list[Path]:
    """Write a truncated, an empty and a huge image, and a text under an image's name; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = write_picture(folder / "truncated.png").read_bytes()
    contents = {
        "truncated.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "huge.png": _png_of_size(100_000, 100_000),
        "text.jpg": b"just a text\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def _png_of_size(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds no pixels: what a decompression bomb begins with."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
