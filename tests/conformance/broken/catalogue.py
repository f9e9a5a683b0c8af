"""Which broken transports there are, and which rules each of them breaks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from tensorferry.core.transport import CONTRACT_VERSION, Transport

MODULES = (
    "lifecycle",
    "connecting",
    "transfer",
    "bounds",
    "statuses",
    "peers",
    "hygiene",
    "imports_torch",
    "imports_busily",
)

C = TypeVar("C", bound=type[Transport])


@dataclass(frozen=True)
class Broken:
    cls: type[Transport]
    fails: dict[str, str]
    """rule -> a pattern that the message has to match: what went wrong, in the suite's words."""
    may: frozenset[str] = frozenset()
    """Rules that it may fail, too: by chance, or because what it breaks shows in a costly rule as well."""

    @property
    def path(self) -> str:
        return f"{self.cls.__module__}:{self.cls.__qualname__}"

    @property
    def name(self) -> str:
        return self.cls.__name__


_all: list[Broken] = []


def broken(fails: dict[str, str], *, may: set[str] | None = None, **members: Any) -> Callable[[C], C]:
    """Enter a class, as one that fails these rules, perhaps those that it `may`, and no other."""

    def enter(cls: C) -> C:
        cls.contract_version = CONTRACT_VERSION
        for name, value in members.items():
            setattr(cls, name, value)
        _all.append(Broken(cls, fails, frozenset(may or ())))
        return cls

    return enter


@cache
def catalogue() -> list[Broken]:
    for name in MODULES:
        importlib.import_module(f"broken.{name}")
    return list(_all)
