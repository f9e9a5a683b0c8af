"""Nothing that comes over the wire does more than be refused or ignored (MSG-4, MSG-5, ID-2)."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from contextlib import suppress
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tensorferry.conformance.protocol import fuzz
from tensorferry.conformance.protocol.transcripts.replay import shipped
from tensorferry.core import messages as m
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine
from tensorferry.core.wire import BadFrame, decode, encode

TRANSCRIPTS = shipped()


def test_no_seed_breaks_anything() -> None:
    counts: Counter[str] = Counter()
    for seed in range(150):
        fuzz.fuzz(seed, TRANSCRIPTS, counts, frames=80)
    assert counts["accepted"] > 250
    assert counts["refused: content"] > 3000
    assert {kind.__name__ for kind in fuzz.KINDS} <= set(counts)


@settings(max_examples=300)
@given(st.randoms(use_true_random=False))
def test_a_bent_frame_is_refused_or_a_message(rng: Random) -> None:
    fuzz.fuzz_decoder(rng, Counter())


@settings(max_examples=40, phases=[Phase.explicit, Phase.generate])
@given(st.randoms(use_true_random=False))
def test_a_lying_peer_breaks_no_machine(rng: Random) -> None:
    fuzz.fuzz_machine(rng, TRANSCRIPTS, Counter(), lies=30)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_messages_are_built_from_the_schema(kind: type[m.Message]) -> None:
    rng = Random(1)
    for _ in range(30):
        message = fuzz.message(rng, kind)
        assert decode(encode(message)) == message


HELLO = ["H", 1, 2, 3, 1, "n", bytes(16), 1, 1, 1]

HUGE = [
    pytest.param(b"\xdd\xff\xff\xff\xff", id="four billion items"),
    pytest.param(b"\xdc\xff\xff" + b"\xc0" * 60_000, id="many items"),
    pytest.param(b"\xdf\xff\xff\xff\xff", id="a map of four billion"),
    pytest.param(b"\xc6\xff\xff\xff\xff", id="four billion bytes"),
    pytest.param(b"\xdb\xff\xff\xff\xff", id="four billion letters"),
    pytest.param(b"\x91" * 900_000, id="deep"),
    pytest.param(msgspec.msgpack.encode([*HELLO, b"", [[]] * 200_000, 1, 1]), id="offers"),
    pytest.param(msgspec.msgpack.encode(["G", 1, 2, 3, 4, 5, 6, bytes(900_000)]), id="runs"),
]  # fmt: skip


@pytest.mark.parametrize("payload", HUGE)
def test_a_number_on_the_wire_allocates_nothing(payload: bytes) -> None:
    data = fuzz.frame(payload)
    tracemalloc.start()
    with pytest.raises(BadFrame):
        decode(data)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * len(data) + (1 << 16)


def many(seeds: int) -> None:
    for seed in range(seeds):
        fuzz.fuzz_machine(Random(seed), TRANSCRIPTS, Counter())


def test_a_machine_that_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = SenderMachine._on_open

    def raises(self: SenderMachine, r: Any, o: m.Open) -> None:
        if o.rank > 1:
            raise KeyError(o.rank)
        open_(self, r, o)

    monkeypatch.setattr(SenderMachine, "_on_open", raises)
    with pytest.raises(fuzz.Broken, match="MSG-4 on_message"):
        many(300)


def test_a_machine_that_heeds_strangers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    heed = ReceiverMachine.on_message

    def open_ears(self: ReceiverMachine, route: str, message: m.Message) -> object:
        with suppress(TypeError):
            message = msgspec.structs.replace(message, dst=self.inc)
        return heed(self, route, message)

    monkeypatch.setattr(ReceiverMachine, "on_message", open_ears)
    with pytest.raises(fuzz.Broken, match="ID-2 a foreign message"):
        many(300)


def test_the_command_runs_for_as_long_as_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fuzz.main(["--seeds", "3", "--seed", "10"]) == 0
    assert "3 seeds" in capsys.readouterr().out
    assert fuzz.main(["--seconds", "0"]) == 0

    def broken(*_: object, **__: object) -> None:
        raise fuzz.Broken("MSG-4 something")

    monkeypatch.setattr(fuzz, "fuzz", broken)
    assert fuzz.main(["--seeds", "3", "--seed", "10"]) == 1
    assert "--seed 10 --seeds 1" in capsys.readouterr().out
