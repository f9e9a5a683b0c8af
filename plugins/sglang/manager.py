"""SGLang's manager: one endpoint of tensorferry, a Sender or a Receiver by the mode of the process."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from tensorferry.core.errors import BadCall, ConfigError
from tensorferry.core.group import Group
from tensorferry.core.layout import Layout
from tensorferry.core.receiving import Receiver
from tensorferry.core.sending import Sender
from tensorferry.core.settings import Settings
from tensorferry.core.transport import Transport
from tensorferry.plugins.opening import opened
from tensorferry.plugins.sglang.buffers import MultimodalBuffers
from tensorferry.plugins.sglang.finding import Finder, Resolve, explicit

log = logging.getLogger("tensorferry.sglang")

EMBEDDING_MODES = frozenset({"encode", "prefill"})
LANGUAGE_MODES = frozenset({"decode", "language"})


class FerryKVManager:
    """The endpoint behind the senders or receivers of one process.

    `disaggregation_mode`: SGLang's enum or its value; encode and prefill send, language and decode receive.
    `args`: its `engine_rank`, if it has one, has to be the group's rank. `server_args`: the embedding side binds
    `disaggregation_bootstrap_port` of this host's loopback unless `bind` says otherwise. The rest are keywords of
    tensorferry, which `functools.partial` puts in where SGLang makes the manager: the layout, which SGLang does not
    know, `group`, and what tensorferry.Sender and Receiver take. `resolve` finds a sender's address
    (see `explicit`); it is called beside the loop, and may take up to `announce_deadline` seconds.

    Raises ConfigError and its kin, and keeps nothing open then. Close it (`close`, `teardown`, or a `with` block).
    """

    enable_deferred_decode_kv_release = False
    supports_deferred_decode_kv_release = False
    supports_host_destination = False
    supports_role_switch = False

    def __init__(
        self,
        args: Any,
        disaggregation_mode: Any,
        server_args: Any,
        is_mla_backend: bool | None = False,
        *,
        layout: Layout,
        bind: str = "",
        group: Group | None = None,
        transport: str | Transport | None = None,
        options: Mapping[str, object] | None = None,
        name: str = "",
        resolve: Resolve = explicit,
        **settings: object,
    ) -> None:
        self.kv_args = args
        self.resolve = resolve
        self._finder = Finder()
        self.receives = _receives(disaggregation_mode)
        rank = getattr(args, "engine_rank", None)
        if group is not None and rank is not None and rank != group.rank:
            raise ConfigError(f"engine_rank is {rank}, and the group says rank {group.rank}")
        with opened(transport, options, settings) as (transports, loaded, passed_over):
            self._endpoint: Sender | Receiver
            if self.receives:
                self._endpoint = Receiver(layout, transports, loaded, group=group, name=name, passed_over=passed_over)
            else:
                port = getattr(server_args, "disaggregation_bootstrap_port", None) or 0
                bind = bind or f"tcp://127.0.0.1:{port}"
                self._endpoint = Sender(layout, transports, loaded, bind=bind, name=name, passed_over=passed_over)
        self.buffers = MultimodalBuffers(layout, loaded, receives=self.receives)

    @property
    def settings(self) -> Settings:
        return self._endpoint.settings

    @property
    def address(self) -> str:
        """Embedding side: where language sides find it."""
        return self.sender.address

    @property
    def sender(self) -> Sender:
        """The endpoint of the embedding side. Raises BadCall on the language side."""
        if not isinstance(self._endpoint, Sender):
            raise BadCall("this process receives: its manager was made for the language side")
        return self._endpoint

    @property
    def receiver(self) -> Receiver:
        """The endpoint of the language side. Raises BadCall on the embedding side."""
        if not isinstance(self._endpoint, Receiver):
            raise BadCall("this process sends: its manager was made for the embedding side")
        return self._endpoint

    def find(self, bootstrap_addr: str, dp_rank: int) -> Future[str]:
        """The control address of an embedding side as `resolve` gives it, or the FerryError for which there is none.
        Never blocks: what is no explicit address is found in another thread."""
        return self._finder.find(self.resolve, bootstrap_addr, dp_rank)

    def register_to_bootstrap(self) -> None:
        """Says in the log where this embedding side is found. There is no bootstrap server: its address is bound from
        the start, and whoever knows it can open a room."""
        log.info("language sides find the embedding side at %s", self.address)

    def should_verify_kv_checksum(self, bootstrap_addr: str) -> bool:
        """No: each block's digest has been verified before its rows count, and no checksum of SGLang's travels."""
        return False

    def teardown(self) -> None:
        """As `close`."""
        self.close()

    def close(self) -> None:
        """Ends every room that is open, on both sides, and gives back all memory."""
        self._endpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _receives(mode: Any) -> bool:
    name = str(getattr(mode, "value", mode)).lower()
    if name in LANGUAGE_MODES:
        return True
    if name in EMBEDDING_MODES:
        return False
    known = ", ".join(sorted(EMBEDDING_MODES | LANGUAGE_MODES))
    raise ConfigError(f"disaggregation mode {name!r} neither sends nor receives", hint=f"It is one of {known}")
