"""The production machines, explored exhaustively: every fault, delay and order that a small world allows.

`python -m tensorferry.conformance.explore --only NAME` prints what a failing test found, step by step.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from tensorferry.conformance.explore import happenings
from tensorferry.conformance.explore.__main__ import main
from tensorferry.conformance.explore.configurations import EVERY, REQUIRED, by_name
from tensorferry.conformance.explore.machines import Workshop
from tensorferry.conformance.explore.search import Graph, State, explore, search
from tensorferry.conformance.explore.setup import Setup
from tensorferry.conformance.explore.step import Step
from tensorferry.conformance.explore.world import SearchWorld


@pytest.mark.parametrize("setup", REQUIRED, ids=lambda setup: setup.name)
def test_every_schedule_is_safe_and_comes_to_a_clean_end(setup: Setup) -> None:
    out = search(SearchWorld(setup), setup.name, limit=600_000)
    assert out.violation is None, "\n".join([out.violation or "", *out.trace])
    assert out.acyclic
    assert not out.bounded


def test_the_configurations_have_names_of_their_own() -> None:
    names = [setup.name for setup in EVERY]
    assert len(set(names)) == len(names)
    assert {f"P{k}" for k in range(1, 26)} | {f"O{k}" for k in range(1, 8)} <= set(names)
    assert {f"P{k}" for k in range(1, 15)} <= {setup.name for setup in REQUIRED}


def reached(setup: Setup) -> set[State]:
    """What processes, data plane and applications can become, without the network.

    What a sender remembers of transfers that are over (`min_live` and tombstones) is left out: a message may bring the
    news earlier or later, and both forms say the same.
    """
    world = SearchWorld(setup)
    projected: dict[int, Any] = {}
    found = set()

    def visit(state: State) -> None:
        for number in state[0]:
            if number not in projected:
                process, incarnation, snapshot = world.shop.kept[number]
                if process >= setup.ranks:
                    receivers = tuple((*row[:4], *row[6:]) for row in snapshot[1])
                    snapshot = (snapshot[0], receivers, *snapshot[2:])
                projected[number] = (process, incarnation, snapshot)
        found.add((tuple(projected[number] for number in state[0]), *state[1:8], state[9]))

    graph = explore(world, world.roots(), compact=True, limit=200_000, visit=visit)
    assert graph.violation is None
    assert not graph.bounded
    return found


@pytest.mark.parametrize(
    "name", ["P1", "P2", "P3", "P4", "P5", "P7", "P9", "P10", "P11", "O1", "O4", "X8", "X11", "R1"]
)
def test_leaving_out_late_messages_changes_nothing(name: str) -> None:
    setup = by_name(name)
    assert reached(setup) == reached(replace(setup, collect=False))


@pytest.mark.parametrize("name", ["P6", "O2", "R3", "X4"])
def test_a_snapshot_survives_restore(name: str) -> None:
    world = SearchWorld(by_name(name))
    explore(world, world.roots(), compact=True, limit=3000)
    for process, incarnation, snapshot in world.shop.kept:
        machine = world.shop.machines[process, incarnation]
        machine.restore(snapshot)
        assert machine.snapshot() == snapshot


@pytest.mark.parametrize("name", ["P6", "P14", "O5", "R2", "X2", "X3", "X12"])
def test_a_snapshot_is_all_that_decides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that live through a walk, never restored, do what the ones on snapshots do."""
    events: list[tuple[int, Any]] = []
    of_edge: dict[int, list[tuple[int, Any]]] = {}
    run, edge = Step.run, happenings._edge

    def recorded(self: Step, process: int, event: Any) -> int:
        events.append((self.procs[process], event))
        return run(self, process, event)

    def remembered(*args: Any, **more: Any) -> Any:
        events.clear()
        made = edge(*args, **more)
        of_edge[id(made)] = list(events)
        return made

    monkeypatch.setattr(Step, "run", recorded)
    monkeypatch.setattr(happenings, "_edge", remembered)
    rng = random.Random(7)
    for _ in range(15):
        world = SearchWorld(by_name(name))
        alive: dict[tuple[int, int], Any] = {}
        events.clear()
        state = world.roots()[0]
        begun = list(events)
        other = Workshop(by_name(name).build())
        other.mail, other.mail_numbers = world.shop.mail, world.shop.mail_numbers
        for step in range(60):
            if step:
                of_edge.clear()
                edges = world.edges(state)
                if not edges:
                    break
                chosen = rng.choice(edges)
                state, begun = chosen.state, of_edge[id(chosen)]  # type: ignore[assignment]
            for number, event in begun:
                process, incarnation, before = world.shop.kept[number]
                key = (process, incarnation)
                if key not in alive:
                    other.fresh(process, incarnation)
                    alive[key] = other.machines[key]
                assert alive[key].snapshot() == before
                _, effects = other._call(alive[key], event)
                todo = [other._compile(process, incarnation, effect) for effect in effects]
                ran = world.shop.run(number, event)
                assert alive[key].snapshot() == world.shop.kept[ran.after][2]
                # who is told first may differ: a snapshot names ranks in their order, not in that of their coming
                assert sorted((t for t in todo if t), key=repr) == sorted(ran.todo, key=repr)


def test_the_command_tells_what_it_explored(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "P1,O6", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "P1 " in said
    assert "violated: none" in said
    with pytest.raises(SystemExit):
        main(["--only", "P99"])


@pytest.mark.parametrize("compact", [False, True])
def test_sets_of_messages_are_told_apart_however_many_messages_there_are(compact: bool) -> None:
    """Python's hash of a number is the number modulo 2**61 - 1: message 61 would be message 0."""
    graph = Graph(compact)
    sets = [0, *(1 << bit for bit in range(400)), (1 << 61) - 1, (1 << 61) | 1]
    assert [graph.add(((), net, ()), -1, -1) for net in sets] == list(range(len(sets)))
    assert [graph.find(((), net, ())) for net in sets] == list(range(len(sets)))
