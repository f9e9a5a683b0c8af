"""A distribution `acme` whose transports a test writes: what another's code does to the commands that ask it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_kit import environment

COMMON = """
import os, signal, threading
from tensorferry.backends.memory import MemoryTransport
from tensorferry.core.transport import Probe, Readiness

class Foreign(MemoryTransport):
    contract_version = 1
    @classmethod
    def probe(cls):
        return Probe(Readiness.READY, "for now", path="tcp")
"""

Foreign = Callable[..., dict[str, str]]


@pytest.fixture
def foreign(tmp_path: Path) -> Foreign:
    """Makes an environment in which a distribution `acme` provides transports: `code` is its module."""

    def make(code: str, /, **names: str) -> dict[str, str]:
        (tmp_path / "acme.py").write_text(code)
        info = tmp_path / "acme-0.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 0.3\n")
        entries = "\n".join(f"{name} = acme:{cls}" for name, cls in names.items())
        (info / "entry_points.txt").write_text(f"[tensorferry.transports]\n{entries}\n")
        return environment(PYTHONPATH=str(tmp_path))

    return make
