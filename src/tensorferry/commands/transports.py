"""`tensorferry transports`: what can move bytes here, which would be taken, and why not the others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tensorferry.commands import probing
from tensorferry.commands.output import Exit, Output

if TYPE_CHECKING:
    from tensorferry.plugins.registry import Plugin, Ranked

_EXAMPLES = """\
examples:
  tensorferry transports               one line a transport, best first
  tensorferry transports --why         with reasons, hints and what each found on this machine
  tensorferry transports --format json | jq '.transports[] | select(.usable) | .name'

status: ready; degraded (works, not as well as it could); unavailable (something is missing); broken (there, and fails)
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "transports",
        parents=[common],
        help="what can move bytes here, and why not the others",
        description="Ask every installed transport whether it can work on this machine. Each is asked in a process of "
        "its own, so that one which crashes or hangs is a line like any other. Exit status 3: none is usable.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--why", action="store_true", help="show reasons, hints and facts")
    parser.add_argument(
        "--timeout",
        type=float,
        default=probing.DEFAULT_SECONDS,
        metavar="SECONDS",
        help="longest wait for one transport's answer (default %(default)g)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> Exit:
    from tensorferry.plugins import registry

    answers = probing.probe_each((plugin.name for plugin in registry.available()), args.timeout, debug=args.debug)
    found = registry.ranked(answers.__getitem__)
    usable = any(entry.probe.usable for entry in found)
    if out.json:
        out.object({"status": "ok" if usable else "failed", "transports": [_as_dict(entry) for entry in found]})
    elif args.why:
        for entry in found:
            _explain(entry, out)
    else:
        out.table(
            ["transport", "provided by", "status", "reason"],
            [[e.name, _providers(e.plugins), str(e.probe.readiness), _without_status(e)] for e in found],
        )
    return Exit.OK if usable else Exit.CANNOT_RUN_HERE


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
