"""`tensorferry transports`: what can move bytes here, which would be taken, and why not the others."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tensorferry.commands import carrying, examining, probing, surveying
from tensorferry.commands.flags import add_settings, load_settings
from tensorferry.commands.output import BadFlag, Exit, Output, exit_for
from tensorferry.core.errors import FerryError
from tensorferry.core.settings import Settings

if TYPE_CHECKING:
    from tensorferry.commands.surveying import Survey
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
        description="Ask every installed transport whether it can work on this machine, and open it for a moment where "
        "it says so. Each is asked in a process of its own, so that one which crashes or hangs is a line like any "
        "other. With --peer the answer is that of a receiver with the settings that hold here (flags, TENSORFERRY_*, "
        "file). Exit status 3: none is usable between two processes; with --peer also: none joins the two sides.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--why", action="store_true", help="show reasons, hints and facts")
    parser.add_argument(
        "--peer",
        metavar="ADDR",
        help="the control address of a running sender: say also which transport both sides would take",
    )
    probing.add_timeout(parser, "longest wait for one transport's answer, and for the peer's")
    add_settings(parser.add_argument_group("with --peer, settings of the receiver"), ["transport", "require"])
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> Exit:
    from tensorferry.plugins import registry

    address = "" if args.peer is None else _peer(args.peer)
    for flag, given in (("--transport", args.setting_transport), ("--require", args.setting_require)):
        if given is not None and not address:
            raise BadFlag(f"{flag} is about the bytes between two sides", hint="Give --peer ADDR as well")
    settings = load_settings(args).settings if address else Settings()
    names = (plugin.name for plugin in registry.available())
    examined = examining.examine_each(names, args.timeout, debug=args.debug)
    found = registry.ranked(lambda name: examined[name].answer)
    if not out.json:
        _show_found(found, out, why=args.why)  # first: a peer may take its time
    survey: Survey | None = None
    error: FerryError | None = None
    if address:
        try:
            survey = surveying.survey(address, settings, args.timeout, debug=args.debug)
        except FerryError as caught:  # what was found here is told all the same
            error = caught
    joined = survey is None or survey.chosen is not None
    usable = any(entry.probe.usable for entry in found if entry.name not in registry.NEVER_AUTOMATIC)
    if out.json:
        told: dict[str, Any] = {
            "status": "ok" if usable and joined and error is None else "failed",
            "transports": [_as_dict(entry) for entry in found],
        }
        if survey is not None:
            told["peer"] = survey.as_dict()
        elif error is not None:
            told["peer"] = {"address": address, "error": error.as_dict()}
        out.object(told)
    elif survey is not None:
        _show(survey, out)
    elif error is not None:
        out.error(error)
    if error is not None:
        return exit_for(error)
    return Exit.OK if usable and joined else Exit.CANNOT_RUN_HERE


def _show_found(found: Sequence[Ranked], out: Output, *, why: bool) -> None:
    if why:
        for entry in found:
            _explain(entry, out)
    else:
        out.table(
            ["transport", "provided by", "status", "reason"],
            [[e.name, _providers(e.plugins), str(e.probe.readiness), _without_status(e)] for e in found],
        )


def _peer(text: str) -> str:
    """A sender's control address. Raises BadFlag for what cannot be one."""
    address = carrying.address(text.strip())
    match = re.fullmatch(r"tcp://[^/\s]+:([0-9]+)", address)
    if match is None or not 1 <= int(match[1]) <= 65535:
        raise BadFlag(
            f"--peer {text!r} is no control address of a sender",
            hint="Give it as tcp://HOST:PORT, with port 1 to 65535",
        )
    return address


def _show(survey: Survey, out: Output) -> None:
    out.line()
    out.line(f"with the sender at {survey.address}: {survey.chosen or 'no transport joins the two sides'}")
    width = max((len(v.name) for v in survey.verdicts), default=0)
    for v in survey.verdicts:
        out.line(f"    {v.name.ljust(width)}  {v.reason}")
    if survey.no_way is not None and survey.no_way.hint:
        out.line(f"hint: {survey.no_way.hint}")


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
