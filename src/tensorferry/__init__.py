"""tensorferry: variable-length embeddings from the process that computes them to the process that consumes them.

    import tensorferry as tf

    layout = tf.embedding_layout(hidden_size=3584)
    sender = tf.Sender(layout, transport="shm")              # embedding side
    receiver = tf.Receiver(layout, transport="shm")          # language side

Importing this loads no engine, no torch and no command-line library; names are loaded when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tensorferry._version import __version__

if TYPE_CHECKING:
    from tensorferry.api import Receiver, Sender
    from tensorferry.core.buffers import Result
    from tensorferry.core.errors import FerryError
    from tensorferry.core.group import Group
    from tensorferry.core.handles import ReceiveTransfer, SendTransfer
    from tensorferry.core.layout import Component, Layout, embedding_layout
    from tensorferry.core.rounds import Round
    from tensorferry.core.settings import Settings
    from tensorferry.core.transfer import Status
    from tensorferry.plugins.rendezvous import open_directory

_HOMES = {
    "Sender": "api",
    "Receiver": "api",
    "Result": "core.buffers",
    "FerryError": "core.errors",
    "errors": "core",
    "Group": "core.group",
    "ReceiveTransfer": "core.handles",
    "SendTransfer": "core.handles",
    "Component": "core.layout",
    "Layout": "core.layout",
    "embedding_layout": "core.layout",
    "open_directory": "plugins.rendezvous",
    "Round": "core.rounds",
    "Settings": "core.settings",
    "Status": "core.transfer",
}

__all__ = [
    "Component",
    "FerryError",
    "Group",
    "Layout",
    "ReceiveTransfer",
    "Receiver",
    "Result",
    "Round",
    "SendTransfer",
    "Sender",
    "Settings",
    "Status",
    "__version__",
    "embedding_layout",
    "errors",
    "open_directory",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'tensorferry' has no attribute {name!r}")
    if name == "errors":
        return import_module("tensorferry.core.errors")
    return getattr(import_module(f"tensorferry.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
