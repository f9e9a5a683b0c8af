"""The golden transcripts: in step with the machines, readable without them, and able to catch a machine that errs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensorferry.conformance.explore.mutants import FencesEarly
from tensorferry.conformance.protocol.transcripts import __main__ as command
from tensorferry.conformance.protocol.transcripts import replay as replaying
from tensorferry.conformance.protocol.transcripts.recorder import FORMAT
from tensorferry.conformance.protocol.transcripts.replay import dumps, record, replay, shipped
from tensorferry.conformance.protocol.transcripts.scenarios import SCENARIOS
from tensorferry.conformance.protocol.transcripts.values import message_of
from tensorferry.core.sender import SenderMachine

SHIPPED = shipped()


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_transcript_is_in_step_with_the_machines(name: str) -> None:
    # After a change of the protocol that is meant: python -m tensorferry.conformance.protocol.transcripts --write
    assert dumps(SHIPPED[name]) == dumps(record(name))


def test_every_transcript_has_its_scenario() -> None:
    assert set(SHIPPED) == set(SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_sides_can_be_held_to_a_transcript(name: str) -> None:
    transcript = SHIPPED[name]
    assert transcript["format"] == FORMAT
    assert transcript["about"]
    for side in transcript["sides"]:
        assert replay(transcript, side) == []


def messages(transcript: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(step["at"], step["in"]["message"]) for step in transcript["steps"] if "message" in step.get("in", {})]


def types(name: str, at: str) -> list[str]:
    return [message["type"] for to, message in messages(SHIPPED[name]) if to == at]


def test_every_kind_of_message_occurs_but_refused() -> None:
    from tensorferry.conformance.protocol.fuzz import KINDS

    said = {message["type"] for transcript in SHIPPED.values() for _, message in messages(transcript)}
    assert {kind.__name__ for kind in KINDS} - said <= {"Refused"}


def test_a_message_that_is_delivered_has_been_sent() -> None:
    for transcript in SHIPPED.values():
        sent = {o["send"]["frame"] for s in transcript["steps"] for o in s.get("then", []) if "send" in o}
        assert {message["frame"] for _, message in messages(transcript)} <= sent


def test_rounds_are_what_the_documentation_says() -> None:
    for name, sizes in {
        "rounds-12000": [64, 30],
        "rounds-50000": [64, 128, 199],
        "first-grant-enough": [4],
    }.items():
        grants = [o["send"] for s in SHIPPED[name]["steps"] for o in s["then"] if "send" in o]
        runs = [g["unpacked"]["runs"] for g in grants if g["type"] == "Grant"]
        assert [sum(count for _, _, count, _ in run) for run in runs] == sizes


def test_outcomes_are_what_the_names_say() -> None:
    def ends(name: str, at: str) -> list[str]:
        steps = [s for s in SHIPPED[name]["steps"] if s["at"] == at and "then" in s]
        return [o["outcome"] for s in steps for o in s["then"] if o.get("do") == "ended"]

    assert ends("no-tokens", "receiver") == ends("no-tokens", "sender") == ["delivered"]
    assert "Grant" not in types("no-tokens", "sender")
    assert ends("cancelled-by-the-receiver", "receiver") == ["cancelled"]
    assert ends("cancelled-by-the-sender", "sender") == ["cancelled"]
    assert ends("sender-restarts-with-the-same-content", "receiver") == ["delivered"]
    assert ends("sender-restarts-with-other-content", "receiver") == ["delivered"]
    assert "Trouble" in types("failed-write", "receiver")
    assert "Trouble" in types("unknown-write", "receiver")
    assert "Fenced" in types("revoked-on-suspicion", "receiver")
    assert ends("group-commits", "rank0") == ends("group-commits", "rank1") == ["delivered"]
    assert ends("group-drops", "rank0") == ends("group-drops", "rank1") == ["cancelled"]
    assert ends("version-mismatch", "receiver") == ["version_mismatch"]
    assert ends("unknown-room", "receiver") == ends("unknown-room", "sender") == ["deadline"]


def test_a_machine_that_errs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    built = replaying.new_machine

    def early(told: dict[str, Any]) -> Any:
        machine = built(told)
        return FencesEarly(machine.hello) if isinstance(machine, SenderMachine) else machine

    monkeypatch.setattr(replaying, "new_machine", early)
    found = replay(SHIPPED["revoked-on-suspicion"], "sender")
    assert found
    assert "Fenced" in found[0]


def test_fields_that_do_not_say_what_the_frame_says_are_refused() -> None:
    message = json.loads(json.dumps(messages(SHIPPED["one-token"])[0][1]))
    assert message_of(message)
    message["fields"]["src"] += 1
    with pytest.raises(ValueError, match="the transcript says"):
        message_of(message)


def test_the_command_replays_and_records(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert said.count(" ok") == sum(len(transcript["sides"]) for transcript in SHIPPED.values())
    stale = tmp_path / "gone.json"
    stale.write_text("{}")
    command.write(tmp_path)
    assert sorted(file.stem for file in tmp_path.iterdir()) == sorted(SCENARIOS)
