"""Fixtures over the helpers in scenario_kit.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test modules are imported by path (--import-mode=importlib), which puts no folder on sys.path for their helpers.
sys.path.insert(0, str(Path(__file__).parent))

from gpu_kit import StandIn, standing_in
from scenario_kit import KINDS

from tensorferry.core import handles


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[handles.Transfer, list[str]]:
    """Every status that a transfer has shown, in order, without repetitions."""
    statuses: dict[handles.Transfer, list[str]] = {}
    published = handles.Transfer._published

    def record(transfer: handles.Transfer) -> None:
        shown = statuses.setdefault(transfer, ["BOOTSTRAPPING"])
        if shown[-1] != transfer.status:
            shown.append(str(transfer.status))
        published(transfer)

    monkeypatch.setattr(handles.Transfer, "_published", record)
    return statuses


@pytest.fixture
def gpu() -> Iterator[StandIn]:
    """Two GPUs that are none: see gpu_kit.py."""
    with standing_in() as stand_in:
        yield stand_in
