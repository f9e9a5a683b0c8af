"""`tensorferry transports`: what can move bytes here, which would be taken, and why not the others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tensorferry.commands import carrying, examining, probing
from tensorferry.commands.output import BadFlag, Exit, Output, exit_for
from tensorferry.core.errors import FerryError
from tensorferry.core.setting_values import seconds

if TYPE_CHECKING:
    from tensorferry.core.selection import Verdict
    from tensorferry.plugins.registry import Plugin, Ranked

_EXAMPLES = """\
examples:
  tensorferry transports               one line a transport, best first
  tensorferry transports --why         with reasons, hints and what each found on this machine
  tensorferry transports --why --peer tcp://10.0.0.1:5555
                                       which of them would carry from the sender there, and why not the others
  tensorferry transports --format json | jq '.transports[] | select(.usable) | .name'

status: ready; degraded (works, not as well as it could); unavailable (something is missing); broken (there, and fails)
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "transports",
        parents=[common],
        help="what can move bytes here, and why not the others",
        description="Ask every installed transport whether it can work on this machine. Each is asked in a process of "
        "its own, so that one which crashes or hangs is a line like any other. Exit status 3: none is usable; with "
        "--peer also: none joins the two sides.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--why", action="store_true", help="show reasons, hints and facts")
    parser.add_argument(
        "--peer",
        metavar="ADDR",
        help="the control address of a running sender: say also which transport both sides would take",
    )
    parser.add_argument(
        "--require", choices=["rdma"], help="with --peer: what the bytes must travel by, as in the setting `require`"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=probing.DEFAULT_SECONDS,
        metavar="SECONDS",
        help="longest wait for one transport's answer, and for the peer's (default %(default)g)",
    )
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    return seconds(text)


_seconds.__name__ = "time"


def run(args: argparse.Namespace, out: Output) -> Exit:
    from tensorferry.plugins import registry

    if args.peer is not None and not args.peer.strip():
        raise BadFlag("--peer is empty", hint="Give the control address of a running sender, tcp://HOST:PORT")
    if args.require and args.peer is None:
        raise BadFlag("--require says what the bytes between two sides must travel by", hint="Give --peer ADDR as well")
    names = (plugin.name for plugin in registry.available())
    examined = examining.examine_each(names, args.timeout, debug=args.debug)
    found = registry.ranked(lambda name: examined[name].answer)
    usable = any(entry.probe.usable for entry in found)
    peer: _Peer | None = None
    error: FerryError | None = None
    address = "" if args.peer is None else carrying.address(args.peer)
    if address:
        try:
            peer = _Peer.survey(address, args.require or "", args.timeout)
        except FerryError as caught:  # what was found here is told all the same
            error = caught
    if out.json:
        ok = usable and error is None and (peer is None or peer.chosen is not None)
        told: dict[str, Any] = {"status": "ok" if ok else "failed", "transports": [_as_dict(entry) for entry in found]}
        if peer is not None:
            told["peer"] = peer.as_dict()
        elif error is not None:
            told["peer"] = {"address": address, "error": error.as_dict()}
        out.object(told)
    else:
        if args.why:
            for entry in found:
                _explain(entry, out)
        else:
            out.table(
                ["transport", "provided by", "status", "reason"],
                [[e.name, _providers(e.plugins), str(e.probe.readiness), _without_status(e)] for e in found],
            )
        if peer is not None:
            peer.show(out)
        elif error is not None:
            out.error(error)
    if error is not None:
        return exit_for(error)
    return Exit.OK if usable and (peer is None or peer.chosen is not None) else Exit.CANNOT_RUN_HERE


class _Peer:
    """What a sender offers, against what can be chosen here."""

    def __init__(self, address: str, name: str, verdicts: Sequence[Verdict]) -> None:
        self.address = address
        self.name = name
        self.verdicts = verdicts
        self.chosen = next((v.name for v in verdicts if v.viable), None)

    @classmethod
    def survey(cls, address: str, require: str, timeout: float) -> _Peer:
        """Ask it, and try each common transport as a receiver here would. Raises PeerUnreachable and its kin."""
        from tensorferry.core.asking import ask
        from tensorferry.core.carriers import Carriers
        from tensorferry.plugins.registry import open_automatic

        hello = ask(address, timeout)
        opened, passed_over = open_automatic()
        carriers = Carriers(opened, require=require, passed_over=passed_over)
        try:
            reach, _ = carriers.survey(hello, address)
            reach.disconnect()
            return cls(address, hello.name, reach.verdicts)
        finally:
            carriers.close()

    def as_dict(self) -> dict[str, Any]:
        return {
            "address": self.address,
            "name": self.name,
            "chosen": self.chosen,
            "transports": [
                {"name": v.name, "path": v.path, "viable": v.viable, "reason": v.reason} for v in self.verdicts
            ],
        }

    def show(self, out: Output) -> None:
        out.line()
        out.line(f"with the sender at {self.address}: {self.chosen or 'no transport joins the two sides'}")
        width = max((len(v.name) for v in self.verdicts), default=0)
        for v in self.verdicts:
            out.line(f"    {v.name.ljust(width)}  {v.reason}")


def _as_dict(entry: Ranked) -> dict[str, Any]:
    return {
        "name": entry.name,
        "provided_by": [
            {"distribution": p.distribution, "version": p.version, "target": p.target} for p in entry.plugins
        ],
        "status": str(entry.probe.readiness),
        "usable": entry.probe.usable,
        "automatic": entry.automatic,
        "path": entry.probe.path,
        "reason": entry.reason,
        "hint": entry.probe.hint,
        "facts": entry.probe.facts,
    }


def _explain(entry: Ranked, out: Output) -> None:
    told = {"provided by": _providers(entry.plugins), "reason": _without_status(entry)}
    if entry.probe.path:
        told["path"] = entry.probe.path
    if entry.probe.hint:
        told["hint"] = entry.probe.hint
    told |= entry.probe.facts
    width = max(map(len, told))
    out.line(f"{entry.name}: {entry.probe.readiness}")
    for name, value in told.items():
        out.line(f"    {name.ljust(width)}  {value}")


def _without_status(entry: Ranked) -> str:
    """The reason without the status in front, which stands beside it."""
    return entry.reason.removeprefix(f"{entry.probe.readiness}: ")


def _providers(plugins: Sequence[Plugin]) -> str:
    return ", ".join(f"{p.distribution} {p.version}" for p in plugins)
