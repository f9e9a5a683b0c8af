"""HYG-12, HYG-14, HYG-15, LIF-9: what opening loads and sets, what happens without that, and how the process ends."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from tensorferry.conformance.model import NotApplicable, check
from tensorferry.conformance.stage import Stage
from tensorferry.conformance.suite.hygiene import class_of, path_of, told_by
from tensorferry.conformance.target import Spec
from tensorferry.conformance.without import Refused
from tensorferry.core.errors import TransportUnavailable


def opened(stage: Stage, refused: Refused | None = None) -> dict[str, Any]:
    """What `conformance.without` tells of opening and a first write."""
    path = path_of(stage)
    spec = stage.target.spec or Spec(path, stage.target.options)
    arguments = [path, msgspec.json.encode(spec).decode()]

    if refused is not None:
        return told_by(stage, "without", "open", *arguments, msgspec.json.encode(refused).decode())
    found: dict[str, Any] = stage.once("opening", lambda: told_by(stage, "without", "open", *arguments))
    return found


@check("HYG-12", joined=False, seconds=180)
def says_what_it_lacks(stage: Stage) -> None:
    usual = opened(stage)
    if usual.get("ended") != "DONE":
        stage.unknown(f"a first write in a fresh process ended {_how(usual)} (LIF-1)")
    told, modules, libraries = usual, set(usual["modules"]), set(usual["libraries"])
    if not (modules or libraries):
        raise NotApplicable("loads nothing from outside of the standard library and tensorferry")
    for _ in range(4):  # what takes the place of something that is refused is refused next
        told = opened(stage, Refused(sorted(modules), sorted(libraries)))
        if modules.issuperset(told["modules"]) and libraries.issuperset(told["libraries"]):
            break
        modules.update(told["modules"])
        libraries.update(told["libraries"])
    what = f"without {', '.join([*sorted(modules), *sorted(libraries)])}"
    stage.note("refused", what)
    stage.expect("probe_raised" not in told, f"{what}, probe raised {told.get('probe_raised')}")
    stage.note("probe", f"{told['probe']}: {told['reason']}")
    if told["usable"]:
        works = told.get("ended") == "DONE"
        stage.expect(works, f"{what}, the probe says {told['probe']}, and a first write ended {_how(told)}")
        return
    stage.expect(told["reason"].strip(), f"{what}, the probe says {told['probe']} and gives no reason")
    typed = told.get("ferry") == TransportUnavailable.__name__
    stage.expect(typed, f"{what}, opening ended {_how(told)}; expected TransportUnavailable")
    words = set(re.findall(r"\w+", told["reason"].lower()))
    said = words & set(re.findall(r"\w+", told["cause"].lower()))
    same = len(said) * 2 >= len(words)
    stage.expect(same, f"{what}, the probe's reason is {told['reason']!r}, and opening says {told['cause']!r}")


def _how(told: dict[str, Any]) -> str:
    if "ferry" in told:
        return f"with {told['ferry']}: {told['cause']}"
    return str(told.get("ended") or f"with {told.get('raised')}")


@check("HYG-14", joined=False, seconds=90)
def sets_what_it_says(stage: Stage) -> None:
    told = opened(stage)
    for name, was_set in told["environment"].items():
        stage.expect(name in told["sets"], f"opening changes {name}, which is not in `sets`")
        stage.expect(not was_set, f"opening changes {name}, which was set before")
    for variable in class_of(stage).sets:
        stage.expect(variable.reason.strip(), f"`sets` gives no reason for {variable.name}")


@check("HYG-15", joined=False, seconds=90)
def leaves_the_process_alone(stage: Stage) -> None:
    path = path_of(stage)
    for what, told in (
        ("importing the class", told_by(stage, "fresh", "import", path)),
        ("probe", told_by(stage, "fresh", "probe", path)),
        ("opening, and a first write,", opened(stage)),
    ):
        stage.expect(not told["process"], f"{what} changes {', '.join(told['process'])}")


@check("LIF-9", joined=False, seconds=90)
def lets_the_process_end(stage: Stage) -> None:
    path = path_of(stage)
    spec = stage.target.spec or Spec(path, stage.target.options)
    told_by(stage, "without", "exit", path, msgspec.json.encode(spec).decode())
