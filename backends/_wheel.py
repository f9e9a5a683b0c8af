"""What an engine's wheel has brought, by the record that the installer keeps of it."""

from __future__ import annotations

import csv
from importlib import metadata
from pathlib import PurePosixPath


def libraries(found: metadata.Distribution) -> dict[PurePosixPath, int]:
    """Each shared library that it has brought, and its size in bytes. Empty where there is no record.

    Not from `files`, which from Python 3.12 on leaves out what is not there any more.
    """
    rows = csv.reader((found.read_text("RECORD") or "").splitlines())
    recorded = {PurePosixPath(row[0]): row[2] for row in rows if len(row) == 3 and ".so" in row[0]}
    return {path: int(size) for path, size in recorded.items() if size.isdecimal()}


def brings(found: metadata.Distribution, library: str) -> bool:
    """Whether it has brought a library of this name, be it there or not."""
    return any(path.name == library for path in libraries(found))


def why_not_whole(found: metadata.Distribution) -> str:
    """Which of its libraries is not there, or not as long as recorded; "" where all are.

    The dynamic loader takes a file that ends too early, as a full disk leaves it, and whoever touches what is not there
    is ended by SIGBUS.
    """
    for path, size in libraries(found).items():
        try:
            there = found.locate_file(str(path)).stat().st_size  # type: ignore[attr-defined]
        except FileNotFoundError:
            return f"its {path.name} is not there"
        if there != size:
            return f"its {path.name} has {there} bytes, and {size} were brought"
    return ""
