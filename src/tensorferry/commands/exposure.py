"""Who can reach what the transports opened, and a firewall for those that let anybody in."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence

from tensorferry.commands.examining import Examined
from tensorferry.commands.findings import Finding, Severity
from tensorferry.commands.listening import Listener, Scope

SET_A_RANGE = {"nixl": "set UCX_TCP_PORT_RANGE=17100-17200 (two ports for each worker), then ask again"}
"""Transports whose ports are any free ones, others each time, unless somebody sets a range; and how that is done."""


def lets_anybody_in(one: Examined) -> bool:
    """It listens beyond this host, and by its own word asks callers for nothing."""
    return _is_open(one) and one.probe.facts.get("authentication", "").startswith("none")


def _is_open(one: Examined) -> bool:
    return any(listener.scope is not Scope.HOST for listener in one.listeners)


def findings(examined: Mapping[str, Examined]) -> list[Finding]:
    found = []
    for name, one in examined.items():
        if not one.listeners:
            continue
        where = ", ".join(listener.where for listener in one.listeners if listener.protocol != "unix")
        facts = one.probe.facts
        authentication = facts.get("authentication", "not known")
        binding = f"Binding to one interface: {facts['binding']}" if "binding" in facts else ""
        if lets_anybody_in(one):
            found.append(
                Finding(
                    Severity.WARNING,
                    name,
                    f"listens beyond this host ({_scopes(one.listeners)}), and lets anybody in. Authentication: "
                    f"{authentication}",
                    f"{_keep(name, one)} {binding}".strip(),
                )
            )
            if _told(one) and not _holds(one):
                what = f"says that its ports are {_told(one)}, and was seen to listen on {_joined(_seen(one))}"
                remedy = "`firewall` has those that were seen, which may be others next time: look into its settings"
                found.append(Finding(Severity.WARNING, name, what, remedy))
        elif _is_open(one):
            severity = Severity.NOTE if "authentication" in facts else Severity.WARNING
            what = f"listens beyond this host ({_scopes(one.listeners)}). Authentication: {authentication}"
            found.append(Finding(severity, name, what, binding))
        elif where:
            found.append(Finding(Severity.OK, name, f"listens on this host only ({where})"))
    return found


def _scopes(listeners: Sequence[Listener]) -> str:
    return ", ".join(dict.fromkeys(one.who for one in listeners if one.scope is not Scope.HOST))


def ports(name: str, one: Examined, protocol: str = "") -> str:
    """What a rule can say of a transport's ports, of one protocol or of all: the range that it draws from, by its own
    word, if what was seen lies in it; else what was seen. Empty where there is none, or they are others each time."""
    seen = _seen(one, protocol)
    if not seen or (not _told(one) and name in SET_A_RANGE):
        return ""
    return _told(one) if _holds(one) else _joined(seen)


def _keep(name: str, one: Examined) -> str:
    drawn = ports(name, one)
    if drawn:
        return f"Keep its ports ({drawn}) from everybody but the peers: see `firewall`."
    return f"Its ports are others each time, so there is no rule that keeps them: {SET_A_RANGE[name]}."


def _told(one: Examined) -> str:
    return one.probe.facts.get("ports", "")


def _seen(one: Examined, protocol: str = "") -> list[int]:
    reached = [li for li in one.listeners if li.scope is not Scope.HOST and protocol in ("", li.protocol)]
    return sorted({listener.port for listener in reached})


def _joined(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _holds(one: Examined) -> bool:
    """Whether every port that was seen is one of those it tells of: 15000-17000, or 5555, 15000-17000."""
    ranges = []
    for part in _told(one).split(","):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip())
        if match is None:
            return False
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return all(any(low <= port <= high <= 65535 for low, high in ranges) for port in _seen(one))


def firewall(examined: Mapping[str, Examined], networks: Sequence[str]) -> str:
    """Rules for nftables that keep the ports of transports that let anybody in for `networks`, the peers'; empty where
    there is none. What else listens in that range is kept for them as well."""
    open_to_all = {name: one for name, one in examined.items() if lets_anybody_in(one)}
    kept = [name for name, one in open_to_all.items() if ports(name, one)]
    if not kept:
        return ""
    left_out = [name for name in open_to_all if name not in kept]
    rules = []
    families = {4: "ip", 6: "ip6"}
    by_family = {
        version: [net for net in networks if ipaddress.ip_network(net).version == version] for version in families
    }
    sets = [
        f"    set peers{version} {{ type ipv{version}_addr; flags interval; elements = {{ {', '.join(nets)} }} }}"
        for version, nets in by_family.items()
        if nets
    ]
    for protocol in ("tcp", "udp"):
        drawn = [drawn for name in kept if (drawn := ports(name, open_to_all[name], protocol))]
        if drawn:
            match = f"{protocol} dport {{ {', '.join(drawn)} }}"
            rules += [f"        {match} {families[v]} saddr @peers{v} accept" for v, nets in by_family.items() if nets]
            rules.append(f"        {match} drop")
    return "\n".join([
        *(f"# Not in here: {name}. Its ports are others each time: {SET_A_RANGE[name]}." for name in left_out),
        f"# {', '.join(kept)}: only for peers. The networks are this host's own: narrow them to the peers'.",
        "table inet tensorferry {",
        *sets,
        "    chain input {",
        "        type filter hook input priority filter; policy accept;",
        '        iifname "lo" accept',
        "        ct state established,related accept",
        *rules,
        "    }",
        "}",
    ])  # fmt: skip
