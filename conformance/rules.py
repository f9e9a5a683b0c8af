"""The numbered rules, read from rules.toml: the one source for checks, command line, reports and documentation."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import cache
from importlib.resources import files

import msgspec

from tensorferry.core.errors import ConfigError

FAMILIES = {
    "LIF": "lifecycle",
    "REG": "regions",
    "CON": "descriptors and connecting",
    "XFR": "transfer",
    "BND": "bounds",
    "VIS": "visibility",
    "ORD": "ordering",
    "ERR": "errors and statuses",
    "FEN": "fences",
    "CAN": "cancel",
    "THR": "concurrency",
    "PEE": "loss of a peer",
    "WAK": "progress and waking",
    "RES": "resources",
    "HYG": "hygiene of the plugin",
    "ID": "identity",
    "WM": "watermark",
    "GR": "grants and pool",
    "WS": "write safety",
    "MSG": "messages",
    "INT": "integrity",
    "AL": "allocation",
    "LV": "liveness and the end",
    "CN": "cancelling a transfer",
    "FO": "fail-over",
    "TP": "ranks",
    "TR": "what the protocol asks of a transport",
}
"""In the order in which they are shown. From ID on they are the protocol's."""

PROTOCOL = frozenset(list(FAMILIES)[list(FAMILIES).index("ID") :])


class Level(IntEnum):
    """How much a rule asks; a failed MUST fails the run."""

    MAY = 1
    SHOULD = 2
    MUST = 3


class Kind(StrEnum):
    REQUIRED = "required"
    OPTIONAL = "optional"
    STOCHASTIC = "stochastic"
    UNTESTED = "untested"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. What the fields mean stands at the head of rules.toml."""

    id: str
    text: str
    intent: str
    level: Level
    kind: Kind
    needs: tuple[str, ...]
    uses: tuple[str, ...]
    since: int
    by: tuple[str, ...]
    where: str

    @property
    def family(self) -> str:
        return self.id.partition("-")[0]

    @property
    def number(self) -> int:
        return int(self.id.partition("-")[2])

    @property
    def part(self) -> str:
        """ "transport" or "protocol"."""
        return "protocol" if self.family in PROTOCOL else "transport"

    def as_dict(self) -> dict[str, object]:
        """The rule as JSON-ready data."""
        return {
            "id": self.id,
            "part": self.part,
            "family": FAMILIES[self.family],
            "level": self.level.name,
            "kind": str(self.kind),
            "needs": list(self.needs),
            "uses": list(self.uses),
            "since": self.since,
            "by": list(self.by),
            "where": self.where,
            "text": self.text,
            "intent": self.intent,
        }


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    intent: str
    level: str = "MUST"
    kind: Kind = Kind.REQUIRED
    needs: str = ""
    uses: list[str] = []
    since: int = 1
    by: list[str] = []
    where: str = ""


@cache
def rules() -> dict[str, Rule]:
    """Every rule by its id, family by family."""
    text = files("tensorferry.conformance").joinpath("rules.toml").read_text(encoding="utf-8")
    rows = msgspec.convert(tomllib.loads(text), dict[str, _Row])
    found = [
        Rule(
            name,
            row.text,
            row.intent,
            Level[row.level],
            row.kind,
            tuple(row.needs.split()),
            tuple(row.uses),
            row.since,
            tuple(row.by),
            row.where,
        )
        for name, row in rows.items()
    ]
    order = list(FAMILIES)
    found.sort(key=lambda rule: (order.index(rule.family), rule.number))
    return {rule.id: rule for rule in found}


def select(names: str = "", level: str = "") -> list[Rule]:
    """The rules that `names` picks: ids, families, "transport" or "protocol", with commas between; all where empty.

    `level`: that level and those above it. Raises ConfigError for a name that picks nothing.
    """
    wanted = list(rules().values())
    if names:
        chosen: set[str] = set()
        for name in filter(None, (part.strip() for part in names.split(","))):
            hit = {r.id for r in wanted if name in (r.id, r.family, r.part)}
            if not hit:
                raise ConfigError(
                    f"no rule, family or part is called {name!r}",
                    hint="`tensorferry conformance rules` lists them; the parts are transport and protocol",
                )
            chosen |= hit
        wanted = [rule for rule in wanted if rule.id in chosen]
    if level:
        try:
            least = Level[level.upper()]
        except KeyError:
            raise ConfigError(f"no level is called {level!r}", hint="There are MUST, SHOULD and MAY") from None
        wanted = [rule for rule in wanted if rule.level >= least]
    return wanted
