"""Small files of Headgate's own, read and replaced as a whole. Users' files are the business of nginx/writer.py."""

from __future__ import annotations

import os
from pathlib import Path


def read(path: Path) -> bytes | None:
    """The content of a file, None where there is none; OSError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def put(path: Path, content: bytes | None) -> None:
    """Put `content` at `path` (None: no file); a crash leaves the former file or this one, and always a whole one."""
    if content is None:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
