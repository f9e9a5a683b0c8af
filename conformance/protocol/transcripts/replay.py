"""Transcripts as data: what ships, what the machines say today, and whether a machine does what a transcript says."""

from __future__ import annotations

import json
from importlib.resources import files
from inspect import getdoc
from typing import Any

from tensorferry.conformance.protocol.transcripts.recorder import FORMAT, Tape, new_machine
from tensorferry.conformance.protocol.transcripts.scenarios import SCENARIOS
from tensorferry.conformance.protocol.transcripts.values import Json, apply, output_json
from tensorferry.core.messages import PROTOCOL_VERSION


def record(name: str) -> Json:
    """The transcript of a scenario, as the production machines play it now."""
    play = SCENARIOS[name]
    tape: Tape = play()
    first = {side: dict(told) for side, told in tape.sides.items()}
    for step in tape.steps:
        if "restart" in step:
            first[step["at"]]["incarnation"] -= 1
    return {
        "format": FORMAT, "name": name, "about": " ".join((getdoc(play) or "").split()),
        "protocol_version": PROTOCOL_VERSION, "sides": first, "steps": tape.steps,
    }  # fmt: skip


def dumps(transcript: Json) -> str:
    """One line for each input and output, so that a change reads well in a diff."""
    head = {name: value for name, value in transcript.items() if name != "steps"}
    lines = [json.dumps(head, indent=1)[:-2] + ',\n "steps": [']
    last = len(transcript["steps"]) - 1
    for k, step in enumerate(transcript["steps"]):
        shown = {name: value for name, value in step.items() if name != "then"}
        text = json.dumps(shown)
        if "then" in step:
            outputs = ",\n    ".join(json.dumps(output) for output in step["then"])
            text = text[:-1] + (f', "then": [\n    {outputs}]}}' if outputs else ', "then": []}')
        lines.append("  " + text + ("," if k < last else ""))
    lines += [" ]", "}"]
    return "\n".join(lines) + "\n"


def shipped() -> dict[str, Json]:
    """The transcripts that are installed with this package, by name."""
    here = files(__package__)
    found = sorted(file.name for file in here.iterdir() if file.name.endswith(".json"))
    return {name.removesuffix(".json"): json.loads((here / name).read_text()) for name in found}


def replay(transcript: Json, side: str) -> list[str]:
    """Play one side of a transcript to a fresh machine. What it did otherwise than written; empty if nothing."""
    told: dict[str, Any] = transcript["sides"][side]
    machine = new_machine(told)
    wrong = []
    for number, step in enumerate(transcript["steps"]):
        if step["at"] != side:
            continue
        if "restart" in step:
            told = {**told, "incarnation": step["restart"]}
            machine = new_machine(told)
            continue
        said = [output for effect in apply(machine, step["in"]) if (output := output_json(effect)) is not None]
        if said != step["then"]:
            wrong.append(f"step {number}: {side} answers {said}, the transcript says {step['then']}")
    return wrong
