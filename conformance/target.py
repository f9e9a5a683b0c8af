"""What is under test: a transport by entry point, by `module:attribute`, by class, or whatever a callable opens."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tensorferry.core.errors import ConfigError, TransportUnavailable, UnknownOption
from tensorferry.core.transport import Transport
from tensorferry.plugins import registry

Factory = Callable[[], Transport]


class Spec(msgspec.Struct, frozen=True):
    """A target as another process can be told of it."""

    name: str
    """An entry point's name, or "module:attribute"."""
    options: dict[str, Any] = {}


@dataclass(frozen=True)
class Target:
    """Opens the transport under test."""

    name: str
    open: Factory
    cls: type[Transport] | None
    """The class, where it is known before an instance is."""
    spec: Spec | None
    """None: no other process can open it, and what needs one is inconclusive."""
    distribution: str = ""
    version: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def resolve(what: str | type[Transport] | Factory, options: Mapping[str, object] | None = None) -> Target:
    """The target that `what` names. Raises what the registry raises, and ConfigError for what cannot be opened."""
    given = dict(options or {})
    if isinstance(what, str) and ":" not in what:
        plugin = next((p for p in registry.available() if p.name == what), None)
        cls = registry.load(what)
        if given:
            _typed(cls, given)  # said now, and not by the first check that opens it
        return Target(
            what,
            lambda: registry.open_transport(what, given),
            cls,
            Spec(what, given),
            plugin.distribution if plugin else "",
            plugin.version if plugin else "",
            given,
        )
    if isinstance(what, str):
        return _found(_import(what), what, given)
    path = f"{what.__module__}:{getattr(what, '__qualname__', '')}" if hasattr(what, "__module__") else ""
    try:
        same = path != "" and _import(path) is what
    except ConfigError:
        same = False
    return _found(what, path if same else "", given)


def _found(thing: Any, path: str, options: dict[str, Any]) -> Target:
    spec = Spec(path, options) if path and not path.startswith("__main__:") else None
    if isinstance(thing, type):
        if not issubclass(thing, Transport):
            raise ConfigError(f"{path or thing} is not a Transport")
        name = getattr(thing, "name", thing.__name__)
        if options:
            _typed(thing, options)
        return Target(str(name), lambda: thing(_typed(thing, options)), thing, spec, options=options)
    if not callable(thing):
        raise ConfigError(f"{path} is a {type(thing).__name__}, neither a Transport nor a callable that opens one")
    if options:
        raise ConfigError("options go to a transport by name or class, not to a callable that opens one")
    return Target(path or getattr(thing, "__name__", "a callable"), thing, None, spec)


def _typed(cls: type[Transport], options: dict[str, Any]) -> Any:
    known = {f.encode_name for f in msgspec.structs.fields(cls.options_type)}
    for name in options:
        if name not in known:
            raise UnknownOption(f"{cls.__name__} has no option {name!r}", hint=f"It has {', '.join(known) or 'none'}")
    try:
        return msgspec.convert(options, cls.options_type, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"an option has a value that it cannot have: {error}") from error


def _import(path: str) -> Any:
    """What `module:attribute` names; modules of the working directory are found, as for hooks."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        hint = "module:Class is looked for in the working directory and where Python looks (PYTHONPATH)"
        raise TransportUnavailable(f"{path} cannot be imported: {error}", hint=hint) from error
    except Exception as error:
        cause = f"the import of {module} raised {type(error).__name__}: {error}"
        raise TransportUnavailable(cause, hint=f"python -c 'import {module}' shows where") from error
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ConfigError(f"{path} is not there: {error}") from error
    return found


_at_start: dict[str, str] = {}


def remember_environment() -> None:
    """Children get the environment as it is now: what the transport's import or probe then changes is not handed on,
    and is a change again in a fresh process."""
    _at_start.update(_environment())


def child_environment() -> dict[str, str]:
    """The environment for a child process that has to find the same modules."""
    paths = [path or os.getcwd() for path in sys.path]
    return {**(_at_start or _environment()), "PYTHONPATH": os.pathsep.join(paths)}


def _environment() -> dict[str, str]:
    """A copy of the environment, made name by name: another thread may take one away meanwhile (pytest does, around
    each test), which `dict(os.environ)` answers with KeyError."""
    values = {name: os.environ.get(name) for name in list(os.environ)}
    return {name: value for name, value in values.items() if value is not None}
