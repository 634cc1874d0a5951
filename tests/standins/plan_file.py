"""Files that begin as engines do; TensorRT itself is not needed for what is held of them."""

from pathlib import Path


def write_plan(path: Path, content: str = "", tag: bytes = b"ftrt") -> Path:
    """A header as TensorRT 10.14.1.48 writes it, and some content behind it."""
    header = tag + bytes(20) + bytes([10, 14, 1, 48])
    path.write_bytes(header + content.encode())
    return path
