"""Broken in how long its import takes: a module of its own, so that no other broken transport pays for it."""

from __future__ import annotations

import time

from broken.catalogue import broken
from tensorferry.backends.memory import MemoryTransport

time.sleep(2.1)


@broken({"HYG-11": r"importing the class takes [2-9]"})
class ImportsSlowly(MemoryTransport):
    pass
