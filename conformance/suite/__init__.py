"""The checks, a module for each family or two. Importing this package imports none of them: `load` does."""

from __future__ import annotations

import importlib

MODULES: tuple[str, ...] = (
    "basics",
    "moving",
    "reading",
    "seeing",
    "refusing",
    "joining",
    "ending",
    "waking",
    "losing",
    "hygiene",
    "loading",
    "leaving",
    "ferrying",
)


def load() -> None:
    """Import every module, which registers its checks."""
    for name in MODULES:
        importlib.import_module(f"tensorferry.conformance.suite.{name}")
