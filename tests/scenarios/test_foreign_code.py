"""A transport that raises where none may, over one peer: that peer's trouble, and nobody else's."""

from __future__ import annotations

from typing import Any

import pytest
from fault_kit import FAULTY, HOLD, proxy, script
from scenario_kit import PATIENCE, SMALL, Quay, eventually, rows

from tensorferry import errors
from tensorferry.core.transport import PeerState

SIZES: dict[str, Any] = {"layout": SMALL, "block_size": 16, "pool_blocks": 8, "first_grant": 64}


def a_defect(*args: object) -> Any:
    raise RuntimeError("a stale handle")


def test_a_peer_whose_state_cannot_be_had_stops_no_timer_of_the_sender(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Quay(**SIZES, sender_settings={"transfer_deadline": 0.5}) as quay:
        quay.carry(10)
        [transport] = quay.sender.carriers.transports
        monkeypatch.setattr(transport, "peer_state", a_defect)
        with pytest.raises(errors.DeadlineExceeded, match="transfer_deadline"):
            quay.sender.announce(2, 10).wait(PATIENCE)
        assert caplog.text.count("peer_state raised") == 1  # and not at every tick


def lose_one_in_the_middle(quay: Quay) -> None:
    """A sender ends while it writes to blocks of ours: its end, which is proved, and nothing else frees them."""
    regions = quay.receiver._call(quay.receiver._buffers.regions)
    other = quay.add_sender(transport=FAULTY["memory"]())
    script(other, lambda n: HOLD)
    other.send(2, **rows(100, layout=SMALL))
    lost = quay.receiver.receive(2, other.address)
    eventually(lambda: proxy(other).held)
    quay.crash(other)
    lost.cancel()
    eventually(lambda: quay.receiver.free_blocks == 8)
    assert quay.receiver._call(quay.receiver._buffers.regions) == regions  # they are the same blocks


def test_a_peer_whose_state_cannot_be_had_holds_up_nobody_elses_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    with Quay(**SIZES) as quay:
        quay.carry(10)
        [transport] = quay.receiver.carriers.transports
        [first] = quay.receiver._known.values()
        peer_state = transport.peer_state

        def broken_for_the_first(peer: Any) -> PeerState:
            return a_defect() if peer is first.reach.lane.peer else peer_state(peer)  # type: ignore[no-any-return]

        monkeypatch.setattr(transport, "peer_state", broken_for_the_first)
        lose_one_in_the_middle(quay)
        quay.carry(10, room=3)


def test_what_disconnect_raises_does_not_cost_the_proof_that_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with Quay(**SIZES) as quay:
        [transport] = quay.receiver.carriers.transports
        monkeypatch.setattr(transport, "disconnect", a_defect)
        lose_one_in_the_middle(quay)
