"""Fixtures over the helpers in transport_ends.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path

import pytest

from tensorferry.backends import _copier, _tcp_link
from tensorferry.backends._mooncake_engine import Engine
from tensorferry.backends._nixl_engine import Agent, Request
from tensorferry.core.transport import Status, Transport

# Test modules are imported by path (--import-mode=importlib), which puts no folder on sys.path for their helpers.
sys.path.insert(0, str(Path(__file__).parent))

from transport_ends import OPENERS, REGION_BYTES, Brake, Pair, Process, ended, need


def _submit(engine: Engine, brake: Brake, session: str, source: int, target: int, nbytes: int) -> int:
    return brake.submit(engine, session, source, target, nbytes)


def _request(agent: Agent, brake: Brake, request: Request) -> bool:
    return brake.request(agent, request)


@pytest.fixture(params=sorted(OPENERS))
def kind(request: pytest.FixtureRequest) -> str:
    need(str(request.param))
    return str(request.param)


@pytest.fixture
def open_one(kind: str) -> Iterator[Callable[[], Transport]]:
    """Opens transports of one kind; whatever the test left open is closed after it."""
    opened: list[Transport] = []

    def open_transport() -> Transport:
        opened.append(OPENERS[kind]())
        return opened[-1]

    yield open_transport
    for transport in opened:
        transport.close()


@pytest.fixture
def pair(kind: str, open_one: Callable[[], Transport]) -> Pair:
    owner, writer = open_one(), open_one()
    region = owner.register(owner.allocate(REGION_BYTES))
    made = Pair(kind, open_one, owner, writer, region, writer.connect(owner.describe()))
    # The first post waits for the memory to be mapped; from here on every post goes straight to the worker.
    handle = made.post(b"\0")
    assert ended(writer, handle) is Status.DONE
    writer.release(handle)
    return made


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Brake]]:
    """Call it to hold copies back from then on."""
    brakes: list[Brake] = []

    def put_on() -> Brake:
        brakes.append(Brake())
        monkeypatch.setattr(_copier, "memmove", brakes[-1].memmove)
        monkeypatch.setattr(_tcp_link, "transmit", brakes[-1].transmit)
        monkeypatch.setattr(Engine, "submit", partialmethod(_submit, brakes[-1]))
        monkeypatch.setattr(Agent, "submit", partialmethod(_request, brakes[-1]))
        return brakes[-1]

    yield put_on
    for used in brakes:
        used.release()


@pytest.fixture
def process() -> Iterator[Callable[..., Process]]:
    """Starts processes; those that are left are killed after the test."""
    started: list[Process] = []

    def start(**options: object) -> Process:
        started.append(Process(**options))
        return started[-1]

    yield start
    for one in started:
        one.end()
