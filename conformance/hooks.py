"""What a third party may add to the suite: a view behind the transport's back, and a hand on its writes and links.

Each method is optional. Write a class with the ones that you can offer, and name it with `--hooks module:Class`; it is
made without arguments, once per process. What needs a method that is not there is tried by chance or inconclusive.

    class Hooks:
        def hold(self, transport): ...                  # from now on, nothing that it posts lands
        def let_go(self, transport): ...                # what was held goes on, late
        def peek(self, transport, region): ...          # -> bytes: what lies there, read past the transport
        def cut(self, transport, peer): ...             # the link is gone
        def heal(self, transport, peer): ...            # and comes back
        def other_version(self, descriptor): ...        # -> bytes: the same, of a version that does not exist
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from tensorferry.core.errors import ConfigError
from tensorferry.core.transport import Region, Transport

METHODS = ("hold", "let_go", "peek", "cut", "heal", "other_version")


class Hooks:
    """The third party's object, or nothing, behind names that can be asked for."""

    def __init__(self, inner: object = None, path: str = "") -> None:
        self.inner = inner
        self.path = path
        """module:Class, for another process."""

    def has(self, *methods: str) -> bool:
        return all(callable(getattr(self.inner, method, None)) for method in methods)

    def has_any(self) -> bool:
        return any(self.has(method) for method in METHODS)

    def hold(self, transport: Transport) -> None:
        self._call("hold", transport)

    def let_go(self, transport: Transport) -> None:
        self._call("let_go", transport)

    def peek(self, transport: Transport, region: Region) -> bytes:
        return bytes(self._call("peek", transport, region))

    def cut(self, transport: Transport, peer: Any) -> None:
        self._call("cut", transport, peer)

    def heal(self, transport: Transport, peer: Any) -> None:
        self._call("heal", transport, peer)

    def other_version(self, descriptor: bytes) -> bytes:
        return bytes(self._call("other_version", descriptor))

    def _call(self, method: str, *arguments: object) -> Any:
        return getattr(self.inner, method)(*arguments)


def load(path: str) -> Hooks:
    """The hooks that `module:Class` names; modules of the working directory are found. Empty: none."""
    if not path:
        return Hooks()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, name = path.partition(":")
    try:
        inner = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"hooks {path!r} cannot be loaded: {error}", hint="Give them as module:Class") from error
    if not Hooks(inner).has_any():
        raise ConfigError(f"hooks {path!r} have none of the methods {', '.join(METHODS)}")
    return Hooks(inner, path)
