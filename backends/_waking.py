"""Calling the function that was given to `on_progress`, from a thread that serves all peers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable


def wake_owner(wake: Callable[[], None] | None, log: logging.Logger) -> None:
    """Call it, if there is one. Whatever it raises is logged, SystemExit too: a bad call of the caller's must not end
    the thread, and with it every other post. A Ctrl-C that meets it in the main thread goes on."""
    if wake is None:
        return
    try:
        wake()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        log.exception("the function given to on_progress failed")
