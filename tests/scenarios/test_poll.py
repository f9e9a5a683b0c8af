"""`poll` tells and never acts: however often it is called, the same is said, seen and moved."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from scenario_kit import PATIENCE, SMALL, Quay, assert_same, eventually, rows

from tensorferry.core import messages as m
from tensorferry.core import timing

ABOUT_THE_RUN = {"src", "dst", "content_id", "digests", "offers", "name", "generations"}


def told(message: m.Message) -> tuple[Any, ...]:
    """A message without what differs from run to run: incarnations, random ids and what is derived from them."""
    fields = {name: getattr(message, name) for name in message.__struct_fields__ if name not in ABOUT_THE_RUN}
    return type(message).__name__, tuple(fields.items())


def listen(end: Any) -> list[tuple[Any, ...]]:
    said: list[tuple[Any, ...]] = []
    send = end._control.send

    def record(route: str, message: m.Message) -> None:
        said.append(told(message))
        send(route, message)

    end._call(lambda: setattr(end._control, "send", record))
    return said


@pytest.fixture
def nothing_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repetitions and heartbeats depend on the clock; without them a transcript depends on the protocol alone."""
    monkeypatch.setattr(timing, "RESEND_FIRST", 1000.0)


def transcript(kind: str, polls: int, seen: Any) -> Any:
    with Quay(kind, layout=SMALL, pool_blocks=8, first_grant=512, heartbeat=500, peer_timeout=1000) as quay:
        saying, answering = listen(quay.receiver), listen(quay.sender)
        given = rows(5000, layout=SMALL)
        receiving = quay.receive()
        eventually(lambda: receiving.status == "WAITING_FOR_INPUT")
        sending = quay.sender.send(1, **given)
        for _ in range(polls) if polls else ():
            quay.receiver.poll()
            quay.sender.poll()
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)
        eventually(lambda: not quay.receiver._call(lambda: quay.receiver.machine.transfers))
        seen_now = seen.pop(receiving), seen.pop(sending)
        # Posts are under way side by side, and which of two is seen to end first is chance: of the sender's answers
        # the set counts.
        return receiving.rounds, receiving.history, seen_now, saying, sorted(answering, key=repr)


def test_0_1_or_10_000_polls_give_the_same_transcript(kind: str, seen: Any, nothing_is_repeated: None) -> None:
    never, once, often = (transcript(kind, polls, seen) for polls in (0, 1, 10_000))
    assert never == once
    assert once == often
    rounds, history, _, saying, answering = never
    assert len(rounds) == len(history) > 2
    names = [name for name, _ in itertools.chain(saying, answering)]
    assert {"Hello", "Open", "Grant", "Announce", "Done", "Close", "Closed"} == set(names)


def test_an_event_loop_of_nothing_but_polls_sees_the_transfer_through(kind: str) -> None:
    with Quay(kind, layout=SMALL, pool_blocks=4) as quay:
        given = rows(3000, layout=SMALL)
        receiving, sending = quay.receive(), quay.sender.send(1, **given)
        marks, changed = [], set()

        def tick() -> bool:
            changed.update(quay.receiver.poll())
            marks.append(receiving.sent_tokens)
            return receiving.done and bool(changed)

        eventually(tick)
        eventually(lambda: sending in quay.sender.poll() or sending.done)
        assert changed == {receiving}
        assert marks == sorted(marks)
        assert_same(receiving.result(), given)


def test_poll_names_each_changed_transfer_once_and_then_nothing(kind: str) -> None:
    with Quay(kind, layout=SMALL) as quay:
        assert quay.receiver.poll() == []
        receiving = quay.carry(10)
        assert receiving in quay.receiver.poll()
        assert quay.receiver.poll() == []
