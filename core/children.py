"""What all who start a process share: a file for what it says, and words for how it ended."""

from __future__ import annotations

import os
import signal
from typing import IO


def nameless_file() -> IO[bytes]:
    """An empty file in memory, without a name, to write and read. It needs no folder that can be written to, which a
    container with a read-only root file system has not. Raises OSError where there is no file descriptor left."""
    return os.fdopen(os.memfd_create("tensorferry"), "w+b")


def end_in_words(status: int) -> str:
    """How a process ended, by the status that Popen has for it: below zero is a signal, and not each has a name."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
