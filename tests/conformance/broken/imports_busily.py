"""Broken in what its import does: a module of its own, so that no other broken transport does it too."""

from __future__ import annotations

import threading

from broken.catalogue import broken
from tensorferry.backends.memory import MemoryTransport

threading.Thread(target=threading.Event().wait, name="started-by-an-import", daemon=True).start()


@broken({"HYG-11": "importing the class changes threads"})
class StartsAThreadWhenImported(MemoryTransport):
    pass
