"""Opening what an endpoint stands on: settings are looked up, transports are opened by name or by choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tensorferry.core.carriers import close_all
from tensorferry.core.errors import ConfigError
from tensorferry.core.selection import Verdict
from tensorferry.core.settings import Settings
from tensorferry.core.transport import Transport
from tensorferry.plugins.registry import AUTO, open_automatic, open_transport


@contextmanager
def opened(
    transport: str | Transport | None, options: Mapping[str, object] | None, settings: Mapping[str, object]
) -> Iterator[tuple[list[Transport], Settings, list[Verdict]]]:
    """The transport of a name (or the setting's), or all to choose from, or one that the caller has opened; the
    settings; and the transports that were passed over in choosing. Whatever is raised in here or by those who use it
    closes the transports, the caller's as well.

    Settings come from the arguments, then TENSORFERRY_*, then tensorferry.toml, then the defaults.
    """
    found = [transport] if isinstance(transport, Transport) else []
    passed_over: list[Verdict] = []
    if not found and not isinstance(transport, str | None):
        raise ConfigError(f"transport is a name or an open Transport, not {transport!r}")
    try:
        named = transport if isinstance(transport, str) else None
        loaded = Settings.load({**settings, "transport": named}).settings
        if not found and loaded.transport == AUTO:
            found, passed_over = open_automatic(options)
        elif not found:
            found = [open_transport(loaded.transport, options)]
        yield found, loaded, passed_over
    except BaseException:
        close_all(found)
        raise
