"""Broken in what its import costs: a module of its own, so that no other broken transport pays for it."""

from __future__ import annotations

import torch

from broken.catalogue import broken
from tensorferry.backends.memory import MemoryTransport


@broken({"HYG-3": "torch"})
class ImportsTorch(MemoryTransport):
    version = torch.__version__
