"""The two endpoints as applications make them: settings are looked up, the transport is opened by name."""

from __future__ import annotations

from collections.abc import Mapping

from tensorferry.core import receiving, sending
from tensorferry.core.allocator import Choose, lowest_runs
from tensorferry.core.group import Group
from tensorferry.core.layout import Layout
from tensorferry.core.transport import Transport
from tensorferry.plugins.opening import opened


class Sender(sending.Sender):
    """The embedding side.

        with tf.Sender(layout, bind="tcp://127.0.0.1:5555") as sender:
            sender.send(room=17, input_embeds=x, fill_ids=ids).wait(timeout=30)

    `bind`: the control address; only this host unless told otherwise. `transport`: a name from `tensorferry
    transports`, "auto" (the default: each receiver is reached by the best that both sides have), or an open Transport,
    which this endpoint owns from the call on: it is closed with it, and also where the call raises. `options` are those
    of the transport that is named. `name`: a stable name for this endpoint, by which a restarted process replaces its
    predecessor at once. `settings`: any setting of docs/settings.md. Raises ConfigError and its kin, and keeps nothing
    open then.

    `close` it, or use it in a `with` block: its thread holds it, so that dropping the last reference ends nothing.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        bind: str = "tcp://127.0.0.1:0",
        transport: str | Transport | None = None,
        options: Mapping[str, object] | None = None,
        name: str = "",
        **settings: object,
    ) -> None:
        with opened(transport, options, settings) as (transports, loaded):
            super().__init__(layout, transports, loaded, bind=bind, name=name)


class Receiver(receiving.Receiver):
    """The language side.

        with tf.Receiver(layout) as receiver:
            result = receiver.receive(room=17, sender="tcp://127.0.0.1:5555").result(timeout=30)

    `group`: this rank's place among several (rank 0 binds the leader's address). The other arguments are those of
    Sender. Raises ConfigError and its kin, and TransportError or OSError where the pool's memory cannot be had; nothing
    stays open then. `close` it, or use it in a `with` block, as a Sender.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        group: Group | None = None,
        transport: str | Transport | None = None,
        options: Mapping[str, object] | None = None,
        name: str = "",
        choose: Choose = lowest_runs,
        poison: bool = False,
        **settings: object,
    ) -> None:
        with opened(transport, options, settings) as (transports, loaded):
            super().__init__(layout, transports, loaded, group=group, name=name, choose=choose, poison=poison)
