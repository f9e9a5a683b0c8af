"""How a command speaks: text for people or one JSON object for programs, errors as cause and hint, and exit statuses.

Colour and layout come from rich, which is imported only when the output is a terminal and NO_COLOR is not set to
something; without a terminal the same words come as plain lines.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import IO, Any, ClassVar

from tensorferry.core.errors import ConfigError, FerryError, TransportUnavailable


class Exit(IntEnum):
    """The command's exit statuses."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CANNOT_RUN_HERE = 3
    SUITE_ERROR = 4
    """Of `conformance run` alone: the suite itself is defective."""


class MissingExtra(ConfigError):
    """Something optional that this command needs is not installed."""

    code: ClassVar[str] = "missing_extra"


class MissingDependency(ConfigError):
    """Something that tensorferry depends on cannot be imported."""

    code: ClassVar[str] = "missing_dependency"


class BadFlag(ConfigError):
    """A flag of the command line has a value that it cannot have."""

    code: ClassVar[str] = "bad_flag"


def exit_for(error: BaseException) -> Exit:
    """Which exit status an error stands for."""
    if isinstance(error, MissingExtra | MissingDependency | TransportUnavailable):
        return Exit.CANNOT_RUN_HERE
    if isinstance(error, BadFlag):
        return Exit.USAGE
    return Exit.FAILED


@dataclass(frozen=True)
class Output:
    """Where a command writes, and in which form."""

    json: bool = False

    @property
    def styled(self) -> bool:
        """Whether to draw: standard output is a terminal that understands more than lines."""
        return not self.json and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def object(self, value: Mapping[str, Any]) -> None:
        """The one JSON object of a command."""
        print(json.dumps(value, indent=2, allow_nan=False), flush=True)

    def line(self, text: str = "") -> None:
        """A line for people; nothing where the output is JSON."""
        if not self.json:
            print(text, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for people: drawn to the terminal's width, or aligned by spaces where there is none."""
        if self.styled:
            from rich import box
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text

            drawn = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
            for row in rows:
                drawn.add_row(*(Text(cell) for cell in row))
            Console().print(drawn)
            return
        widths = [max(len(row[k]) for row in (columns, *rows)) for k in range(len(columns))]
        for row in (columns, *rows):
            self.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def error(self, error: FerryError) -> None:
        """Cause and hint, on standard error; or {"status": "failed", "error": …} where the output is JSON."""
        if self.json:
            self.object({"status": "failed", "error": error.as_dict()})
        else:
            print_error(error, sys.stderr)


def print_error(error: FerryError, stream: IO[str]) -> None:
    """`error: …` and `hint: …`, each on a line of its own."""
    where = ", ".join(
        f"{name} {value}"
        for name, value in (("room", error.room), ("peer", error.peer), ("transport", error.transport))
        if value is not None
    )
    print(f"error: {error.cause}{f' [{where}]' if where else ''} ({error.code})", file=stream)
    if error.hint:
        print(f"hint:  {error.hint}", file=stream)
    stream.flush()
