"""Who can reach what the transports opened, and a firewall for those that let anybody in."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

from tensorferry.commands.examining import Examined
from tensorferry.commands.findings import Finding, Severity
from tensorferry.commands.listening import Listener, Scope


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
                    f"Keep its ports ({ports(one)}) from everybody but the peers: see `firewall`. {binding}".strip(),
                )
            )
        elif _is_open(one):
            severity = Severity.NOTE if "authentication" in facts else Severity.WARNING
            what = f"listens beyond this host ({_scopes(one.listeners)}). Authentication: {authentication}"
            found.append(Finding(severity, name, what, binding))
        elif where:
            found.append(Finding(Severity.OK, name, f"listens on this host only ({where})"))
    return found


def _scopes(listeners: Sequence[Listener]) -> str:
    return ", ".join(dict.fromkeys(one.who for one in listeners if one.scope is not Scope.HOST))


def ports(one: Examined) -> str:
    """The range it draws from, by its own word, else those that were seen."""
    seen = [str(listener.port) for listener in one.listeners if listener.scope is not Scope.HOST]
    return one.probe.facts.get("ports") or ", ".join(dict.fromkeys(seen))


def firewall(examined: Mapping[str, Examined], networks: Sequence[str]) -> str:
    """Rules for nftables that keep the ports of transports that let anybody in for `networks`, the peers'; empty where
    there is none. What else listens in that range is kept for them as well."""
    open_to_all = {name: one for name, one in examined.items() if lets_anybody_in(one)}
    if not open_to_all:
        return ""
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
        drawn = []
        for one in open_to_all.values():
            of_protocol = {li.port for li in one.listeners if li.protocol == protocol and li.scope is not Scope.HOST}
            if of_protocol:
                told = one.probe.facts.get("ports", "")
                drawn.append(told or ", ".join(map(str, sorted(of_protocol))))
        if drawn:
            match = f"{protocol} dport {{ {', '.join(drawn)} }}"
            rules += [f"        {match} {families[v]} saddr @peers{v} accept" for v, nets in by_family.items() if nets]
            rules.append(f"        {match} drop")
    return "\n".join([
        f"# {', '.join(open_to_all)}: only for peers. The networks are this host's own: narrow them to the peers'.",
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
