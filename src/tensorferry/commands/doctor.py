"""`tensorferry doctor`: what works on this machine, what does not and why, who can reach it, and what would help."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensorferry.commands import probing
from tensorferry.commands.output import BadFlag, Exit, Output
from tensorferry.core.errors import FerryError
from tensorferry.core.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from tensorferry.commands.examining import Examined, Verbs
    from tensorferry.commands.findings import Finding
    from tensorferry.commands.rdma_facts import Device, Step
    from tensorferry.plugins.registry import Plugin

_EXAMPLES = """\
examples:
  tensorferry doctor                    this host and every installed transport
  tensorferry doctor mooncake           one transport; it is a problem if it does not work
  tensorferry doctor --format json | jq '.rdma'
                                        why not RDMA: each step from the hardware up, to the first that is missing
  tensorferry doctor --format json | jq -r .firewall
                                        rules for nftables, where a transport lets anybody in

A transport that works is opened for a moment, with default options, to see what it listens on. Findings are ok, note,
warning or problem; a problem is something that should work here and does not.

exit status: 0 no problem, 1 problems, 2 wrong usage, 3 no transport works
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "doctor",
        parents=[common],
        help="what is wrong on this machine, why not RDMA, and who can connect",
        description="Examine this host and every installed transport, each in a process of its own, so that one which "
        "crashes or hangs is a line like any other: what works, what is missing and what would help, which ports are "
        "open to whom, and what stands between this host and RDMA.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="transports to examine (default: all)")
    probing.add_timeout(parser, "longest wait for one transport")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> Exit:
    from tensorferry.commands.examining import examine_each
    from tensorferry.plugins import registry

    plugins: dict[str, list[Plugin]] = {}
    for plugin in registry.available():
        plugins.setdefault(plugin.name, []).append(plugin)
    wanted = list(dict.fromkeys(args.names)) or list(plugins)
    for name in wanted:
        if name not in plugins:
            close = difflib.get_close_matches(name, list(plugins), n=1)
            raise BadFlag(
                f"no installed distribution provides a transport {name!r}",
                hint=(f"Did you mean {close[0]!r}? " if close else "") + f"Installed: {', '.join(plugins) or 'none'}",
            )
    examined = examine_each(wanted, args.timeout, debug=args.debug)
    settings: Settings | FerryError
    try:
        settings = Settings.load().settings
    except FerryError as refused:
        settings = refused
    about = {name: plugins[name] for name in wanted}
    report = diagnose(about, examined, named=bool(args.names), settings=settings, installed=plugins)
    if out.json:
        out.object(report.as_dict())
    else:
        report.show(out)
    return report.exit


@dataclass(frozen=True)
class Report:
    plugins: Mapping[str, Sequence[Plugin]]
    examined: Mapping[str, Examined]
    host: Mapping[str, str]
    devices: Sequence[Device]
    steps: Sequence[Step]
    findings: Sequence[Finding]
    """Worst first."""
    firewall: str

    @property
    def exit(self) -> Exit:
        from tensorferry.commands.findings import Severity, worst
        from tensorferry.plugins.registry import NEVER_AUTOMATIC

        between_processes = [name for name in self.examined if name not in NEVER_AUTOMATIC]
        if not any(self.examined[name].serves for name in between_processes or self.examined):
            return Exit.CANNOT_RUN_HERE
        return Exit.FAILED if worst(self.findings) is Severity.PROBLEM else Exit.OK

    def as_dict(self) -> dict[str, Any]:
        from tensorferry.commands.findings import worst
        from tensorferry.commands.host_facts import IRRELEVANT
        from tensorferry.commands.rdma_facts import answer

        return {
            "status": "ok" if self.exit is Exit.OK else "failed",
            "worst": str(worst(self.findings)),
            "findings": [finding.as_dict() for finding in self.findings],
            "transports": [self._transport(name, one) for name, one in self.examined.items()],
            "rdma": {
                "answer": answer(self.steps),
                "works": all(step.state == "ok" for step in self.steps),
                "steps": [step.as_dict() for step in self.steps],
                "devices": [device.as_dict() for device in self.devices],
            },
            "host": dict(self.host),
            "firewall": self.firewall,
            "not_looked_at": IRRELEVANT,
        }

    def _transport(self, name: str, one: Examined) -> dict[str, Any]:
        return {
            "name": name,
            "provided_by": [
                {"distribution": p.distribution, "version": p.version, "target": p.target} for p in self.plugins[name]
            ],
            "status": str(one.probe.readiness),
            "reason": one.probe.reason,
            "hint": one.hint or one.probe.hint,
            "opened": one.opened,
            "refused": one.refused,
            "path": one.path or one.probe.path,
            "facts": one.probe.facts,
            "listens": [listener.as_dict() for listener in one.listeners],
        }

    # ---- for people ----------------------------------------------------------------------------------------

    def show(self, out: Output) -> None:
        from tensorferry.commands.host_facts import IRRELEVANT
        from tensorferry.commands.rdma_facts import answer

        _heading(out, "this host")
        _pairs(out, self.host)
        _pairs(out, {f"not looked at: {name}": why for name, why in IRRELEVANT.items()})
        _heading(out, "transports")
        out.table(
            ["transport", "provided by", "status", "path", "reason"],
            [
                [
                    name,
                    ", ".join(f"{p.distribution} {p.version}" for p in self.plugins[name]),
                    "fails to open" if one.refused else str(one.probe.readiness),
                    one.path or one.probe.path,
                    one.refused or one.probe.reason,
                ]
                for name, one in self.examined.items()
            ],
        )
        for name, one in self.examined.items():
            if one.probe.facts:
                out.line()
                out.line(f"{name}:")
                _pairs(out, one.probe.facts)
        _heading(out, "open ports, while a transport is open")
        rows = [
            [name, listener.protocol, listener.address if listener.protocol == "unix" else listener.where, listener.who]
            for name, one in self.examined.items()
            for listener in one.listeners
        ]
        if rows:
            out.table(["transport", "", "where", "who can reach it"], rows)
        else:
            out.line("none")
        _heading(out, f"why not RDMA? {answer(self.steps)}")
        out.table(["step", "", "found"], [[step.name, str(step.state), step.found] for step in self.steps])
        for step in self.steps:
            if step.remedy:
                out.line(f"remedy: {step.remedy}")
        if self.firewall:
            _heading(out, "firewall (nftables)")
            out.line(self.firewall)
        _heading(out, "findings, the worst last")
        for finding in reversed(self.findings):
            _said(out, str(finding.severity), f"{finding.about}: {finding.what}")
            if finding.remedy:
                out.line(f"    remedy: {finding.remedy}")


_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


def _heading(out: Output, text: str) -> None:
    out.line()
    if out.styled:
        from rich.console import Console
        from rich.text import Text

        Console().print(Text(text, style="bold"), soft_wrap=True)
    else:
        out.line(f"== {text}")


def _said(out: Output, severity: str, text: str) -> None:
    if out.styled:
        from rich.console import Console
        from rich.text import Text

        Console().print(Text.assemble((severity, _STYLES[severity]), f": {text}"), soft_wrap=True)
    else:
        out.line(f"{severity}: {text}")


def _pairs(out: Output, told: Mapping[str, str]) -> None:
    width = max(map(len, told), default=0)
    for name, value in told.items():
        out.line(f"    {name.ljust(width)}  {value}")


# ---- the diagnosis -------------------------------------------------------------------------------------------


def diagnose(
    plugins: Mapping[str, Sequence[Plugin]],
    examined: Mapping[str, Examined],
    *,
    named: bool,
    root: Path | None = None,
    verbs: Verbs | None = None,
    cma: Finding | None = None,
    settings: Settings | FerryError | None = None,
    installed: Collection[str] = (),
) -> Report:
    """`named`: the user asked for these transports, and means them to work. `root`, `verbs` and `cma` stand in for this
    host's files and for what was tried on it. `settings`: those that hold here, or why they cannot be read; the
    defaults, by default. `installed`: every transport, if not only what was examined."""
    from tensorferry.commands import examining, exposure, host_facts, rdma_facts
    from tensorferry.commands.findings import worst_first
    from tensorferry.plugins.registry import BUILT_IN

    base = root or host_facts.ROOT
    settings = settings or Settings()
    wanted = "" if isinstance(settings, FerryError) else settings.transport
    devices = rdma_facts.devices(base)
    engines = {name: one for name, one in examined.items() if name not in BUILT_IN}
    ground = rdma_facts.Ground(
        devices,
        lambda: verbs or examining.ask_verbs(probing.DEFAULT_SECONDS),
        engines,
        host_facts.memlock(),
        host_facts.may_lock(base),
        base,
    )
    steps = rdma_facts.why_not(ground)
    findings = [
        *_of_settings(settings, installed or examined, {} if named else examined),
        *(
            _of_transport(name, one, named=named or name == wanted, built_in=name in BUILT_IN)
            for name, one in examined.items()
        ),
        *exposure.findings(examined),
        *_of_rdma(devices, steps, host_facts.gpus(base), base),
        *host_facts.findings(base, cma, None if isinstance(settings, FerryError) else settings),
    ]
    networks = host_facts.networks(host_facts.interfaces(base))
    return Report(
        plugins,
        examined,
        host_facts.facts(base) | _device_facts(devices),
        devices,
        steps,
        worst_first(findings),
        exposure.firewall(examined, networks),
    )


def _of_settings(
    settings: Settings | FerryError, installed: Collection[str], examined: Mapping[str, Examined]
) -> list[Finding]:
    """What every endpoint with these settings would refuse. `examined`: every transport; empty where some were named,
    for then it is not known what the others can do."""
    from tensorferry.commands.findings import Finding, Severity
    from tensorferry.plugins.registry import AUTO

    if isinstance(settings, FerryError):
        return [Finding(Severity.PROBLEM, "settings", f"every endpoint refuses them: {settings.cause}", settings.hint)]
    name, path = settings.transport, settings.require
    where = "`tensorferry config show --origin` says where it is set"
    found = []
    if name != AUTO and name not in installed:
        what = f"every endpoint refuses them: transport is {name}, and no installed distribution provides it"
        found.append(Finding(Severity.PROBLEM, "settings", what, f"Installed: {', '.join(installed)}; {where}"))
    fit = [one for which, one in examined.items() if one.serves and name in (AUTO, which)]
    if path and examined and not any(one.path == path for one in fit):
        what = f"every endpoint refuses them: require is {path}, and no transport here that may be taken goes over it"
        remedy = f'"why not RDMA?" says what is missing; {where}'
        found.append(Finding(Severity.PROBLEM, "settings", what, remedy))
    return found


def _of_transport(name: str, one: Examined, *, named: bool, built_in: bool) -> Finding:
    from tensorferry.commands.findings import Finding, Severity
    from tensorferry.core.selection import preference
    from tensorferry.core.transport import Readiness

    probe = one.probe
    last = probe.facts.get("last_words", "")
    if last:
        last = f'. It last said: "{last}"'
    if one.refused:
        return Finding(Severity.PROBLEM, name, one.refused + last, one.hint)
    if one.opened and probe.path and preference(name, one.path) > preference(name, probe.path):
        what = f"falls back without a word: its probe finds {probe.path}, and open it goes over {one.path}"
        return Finding(Severity.PROBLEM, name, what, probe.hint or '"why not RDMA?" says what is missing')
    if probe.readiness is Readiness.READY:
        return Finding(Severity.OK, name, f"ready, over {one.path}: {probe.reason}")
    if probe.readiness is Readiness.DEGRADED:
        severity = Severity.WARNING if named or built_in else Severity.NOTE
    elif probe.readiness is Readiness.UNAVAILABLE and not (named or built_in or "engine" in probe.facts):
        severity = Severity.NOTE  # an engine that nobody has installed
    else:
        severity = Severity.PROBLEM
    return Finding(severity, name, f"{probe.readiness}: {probe.reason}{last}", probe.hint)


def _of_rdma(devices: Sequence[Device], steps: Sequence[Step], gpus: Sequence[str], root: Path) -> list[Finding]:
    """Where a port is active, what keeps it from being used is a problem; without a device it is how this host is."""
    from tensorferry.commands.findings import Finding, Severity
    from tensorferry.commands.rdma_facts import idle_cards

    found = []
    for step in steps:
        if step.state == "missing":
            severity = Severity.WARNING
            if step.name == "device" and not idle_cards(root):
                severity = Severity.NOTE
            elif step.name in ("GID", "permission", "user-space driver", "locked memory"):
                severity = Severity.PROBLEM
            found.append(Finding(severity, "rdma", f"{step.name}: {step.found}", step.remedy))
    active = [device for device in devices if device.active]
    if active:
        for device in devices:
            if not device.active:
                states = ", ".join(map(str, device.ports)) or "no port"
                found.append(
                    Finding(
                        Severity.WARNING,
                        "rdma",
                        f"{device.name} is down: {states}",
                        "`rdma link`, `ip link`, the cable",
                    )
                )
        modules = ("nvidia_peermem", "nv_peer_mem")
        if gpus and not any((root / "sys/module" / module).exists() for module in modules):
            found.append(
                Finding(
                    Severity.NOTE,
                    "rdma",
                    "nvidia_peermem is not loaded: GPU memory goes over RDMA only where the engine uses DMA-BUF",
                    "`modprobe nvidia_peermem`, on the host",
                )
            )
    return found


def _device_facts(devices: Sequence[Device]) -> dict[str, str]:
    told = {}
    for device in devices:
        gids = [str(gid) for port in device.ports for gid in port.gids]
        told[f"RDMA device {device.name}"] = "; ".join(
            [device.driver, device.character_device or "no character device", *map(str, device.ports), *gids]
        )
    return told or {"RDMA devices": "none"}
