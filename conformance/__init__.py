"""The suite that every transport has to pass: numbered rules, checks behind them, and `run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorferry.conformance.model import Finding, Tier, Verdict
    from tensorferry.conformance.runner import Report, run

__all__ = ["Finding", "Report", "Tier", "Verdict", "run"]


def __getattr__(name: str) -> Any:
    """Loaded when they are asked for: importing this package costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tensorferry.conformance import model, runner

    return getattr(runner, name, None) or getattr(model, name)
