"""A transport looked at more closely, in a process of its own: `python -m tensorferry.commands.examining …`.

`transport NAME` asks its probe and, if that finds it usable, opens it for a moment: what it then says of its path, and
which sockets it listens on. `variables NAME` imports it and tells which variables it sets. `verbs` asks the system's
libibverbs which devices it has a driver for. Each answer is a line of JSON, so that what comes before a crash or a hang
is known.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tensorferry.commands import probing
from tensorferry.commands.listening import Listener, own_listeners, own_sockets
from tensorferry.core.errors import FerryError, TransportUnavailable
from tensorferry.core.transport import EngineVariable, Probe, Readiness


@dataclass(frozen=True)
class Examined:
    """One transport. `refused`: why it did not open, although its probe said that it would; empty if it did."""

    probe: Probe
    opened: bool = False
    path: str = ""
    """By its own word, when it was open."""
    listeners: tuple[Listener, ...] = ()
    refused: str = ""
    hint: str = ""

    @property
    def serves(self) -> bool:
        return self.probe.usable and self.opened

    @property
    def answer(self) -> Probe:
        """What its probe would say if it knew what came of opening it."""
        if self.refused:
            return replace(self.probe, readiness=Readiness.BROKEN, reason=self.refused, hint=self.hint)
        return replace(self.probe, path=self.path or self.probe.path)


@dataclass(frozen=True)
class Verbs:
    """The devices that user space can use; `problem` where it could not even be asked."""

    devices: tuple[str, ...] = ()
    problem: str = ""


def examine_each(
    names: Iterable[str], seconds: float = probing.DEFAULT_SECONDS, *, debug: bool = False
) -> dict[str, Examined]:
    """Each transport in a process of its own. Never raises for what a transport does."""
    return probing.ask_each(names, lambda name: examine(name, seconds, debug=debug))


def examine(name: str, seconds: float, *, debug: bool = False) -> Examined:
    ended = probing.run_child(__spec__.name, "transport", name, seconds=seconds, debug=debug)
    first, _, second = ended.said.partition(b"\n")
    more = "; `--timeout` waits longer" if "no answer" in ended.how else ""
    hint = f"`tensorferry doctor --debug {name}` shows what it prints{more}"
    if not ended.started:
        hint = probing.NOT_STARTED
    last = {"last_words": ended.last_words} if ended.how and ended.last_words else {}
    if not first:
        return Examined(Probe(Readiness.BROKEN, f"its probe {ended.how or 'said nothing'}", hint, last))
    probe = probing.parse(first)
    if not probe.usable:
        return Examined(probe)
    try:
        told = json.loads(second)
        listeners = tuple(Listener.from_dict(one) for one in told["listeners"])
        refused, said = probing.one_line(told["refused"]), probing.one_line(told["hint"])
        if refused and said in ("", TransportUnavailable.default_hint):  # which is to do what is being done here
            said = hint
        return Examined(probe, bool(told["opened"]), probing.one_line(told["path"]), listeners, refused, said)
    except (ValueError, KeyError, TypeError, AttributeError):
        why = ended.how or f"answered {second[:80]!r}"
        return Examined(replace(probe, facts=probe.facts | last), refused=f"opening it: its process {why}", hint=hint)


def ask_variables(name: str, seconds: float) -> list[EngineVariable]:
    """As `variables`, asked in a process of its own; none where that crashes or hangs."""
    ended = probing.run_child(__spec__.name, "variables", name, seconds=seconds)
    try:
        return [EngineVariable(*map(str, one)) for one in json.loads(ended.said)]
    except (ValueError, TypeError):
        return []


def variables(name: str) -> list[EngineVariable]:
    """What a transport sets of its engine's environment. None where it cannot be loaded: `tensorferry transports` says
    what is wrong with it."""
    from tensorferry.plugins import registry

    try:
        return list(registry.load(name).sets)
    except FerryError:
        return []


def ask_verbs(seconds: float) -> Verbs:
    ended = probing.run_child(__spec__.name, "verbs", seconds=seconds)
    if ended.how:
        return Verbs(problem=f"asking libibverbs for its devices {ended.how}")
    told = json.loads(ended.said)
    return Verbs(tuple(told["devices"]), told["problem"])


# ---- in the child --------------------------------------------------------------------------------------------


@dataclass
class _Opened:
    opened: bool = False
    path: str = ""
    listeners: list[Mapping[str, Any]] = field(default_factory=list)
    refused: str = ""
    hint: str = ""


def _open(name: str) -> _Opened:
    from tensorferry.commands.host_facts import interface_addresses
    from tensorferry.plugins import registry

    before = own_sockets()
    try:
        transport = registry.open_transport(name)
        path = str(transport.path())
    except FerryError as error:
        return _Opened(refused=error.cause, hint=error.hint)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code, and the answer says what it raised
        return _Opened(refused=f"opening it raised {type(error).__name__}: {error}")
    found = own_listeners(but=before, interfaces=interface_addresses())
    return _Opened(True, path, [one.as_dict() for one in found])


def _verbs() -> Verbs:
    """As `ibv_devices` does it: a device without a user-space driver is not in the list."""
    try:
        library = ctypes.CDLL("libibverbs.so.1", use_errno=True)
    except OSError as error:
        return Verbs(problem=str(error))
    library.ibv_get_device_list.restype = ctypes.POINTER(ctypes.c_void_p)
    library.ibv_get_device_name.restype = ctypes.c_char_p
    library.ibv_get_device_name.argtypes = [ctypes.c_void_p]
    count = ctypes.c_int(0)
    devices = library.ibv_get_device_list(ctypes.byref(count))
    if not devices:
        number = ctypes.get_errno()
        return Verbs(problem=f"ibv_get_device_list failed: {os.strerror(number)}" if number else "")
    return Verbs(tuple(library.ibv_get_device_name(devices[k]).decode() for k in range(count.value)))


def main() -> int:
    own, asked = probing.begin()
    if asked[0] == "verbs":
        found = _verbs()
        print(json.dumps({"devices": found.devices, "problem": found.problem}), file=own)
    elif asked[0] == "variables":
        print(json.dumps([[one.name, one.value, one.reason] for one in variables(asked[1])]), file=own)
    else:
        from tensorferry.plugins import registry

        answer = registry.probe(asked[1])
        print(json.dumps(probing.told(answer)), file=own, flush=True)
        if answer.usable:
            print(json.dumps(vars(_open(asked[1]))), file=own)
    own.flush()
    os._exit(0)  # what is open ends with the process; an engine's destructors cannot change the answer any more


if __name__ == "__main__":
    sys.exit(main())
