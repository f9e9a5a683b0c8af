"""Environment variables of engines, for a while."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tensorferry.core.transport import EngineVariable


@contextmanager
def left_as_found(variables: Iterable[EngineVariable]) -> Iterator[None]:
    """What the block sets of these is unset at its end, and what was set before stays. For probes: engines take up some
    variables when they are loaded, and a probe opens nothing that could want them afterwards."""
    fresh = [variable.name for variable in variables if variable.name not in os.environ]
    try:
        yield
    finally:
        for name in fresh:
            os.environ.pop(name, None)
