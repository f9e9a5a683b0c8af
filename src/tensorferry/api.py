"""The two endpoints as applications make them: settings are looked up, the transport is opened by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from tensorferry.core import receiving, sending
from tensorferry.core.allocator import Choose, lowest_runs
from tensorferry.core.directory import Entry
from tensorferry.core.errors import BadCall
from tensorferry.core.group import Group
from tensorferry.core.layout import Layout
from tensorferry.core.transport import Transport
from tensorferry.plugins.opening import opened
from tensorferry.plugins.rendezvous import Publication, find, open_directory
from tensorferry.reachable import reachable

log = logging.getLogger("tensorferry.api")


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
        self._publications: list[Publication] = []
        self._leaving = False
        with opened(transport, options, settings) as (transports, loaded, passed_over):
            super().__init__(layout, transports, loaded, bind=bind, name=name, passed_over=passed_over)

    def publish(self, name: str = "", *, address: str = "") -> Publication:
        """Be found under `name` (default: the endpoint's own) in the directory of the settings, until this is closed or
        what is returned is. The entry is renewed by a thread of its own and expires peer_timeout after the last time;
        it replaces an earlier incarnation's.

        `address`: what receivers are told; by default the bound one, or where it is bound to every interface, the one
        by which this host reaches others, looked up at each renewal: the network may come up later. Waits a few
        seconds at most for the directory. Raises ConfigError, UnknownDirectory, DirectoryUnavailable, NameTaken,
        BadEntry or VersionMismatch, and BadCall where the endpoint is closed, before or meanwhile; all that goes wrong
        later is the publication's `error`, and hurts no transfer.
        """
        self._call(lambda: None)  # raises after `close`, and in a forked child
        addresses, only_here = reachable(self.address)
        if only_here and not address:
            log.info("%s is published, and only this host can reach it", addresses[0])
        entry = Entry(name=name or self.name, address=address or addresses[0], incarnation=self.incarnation)
        made = Publication(
            open_directory(self.settings.directory),
            entry,
            self.settings.peer_timeout,
            found_at=lambda before: address or self._found_at(before),
        )
        self._publications.append(made)
        if self._leaving:  # `close` may have looked through the list before: nobody else would end it
            made.close()
            raise BadCall("the endpoint is closed")
        return made

    def _found_at(self, before: str) -> str:
        """As before, as long as that can be dialed; and where the network is down, for it will be back."""
        addresses, only_here = reachable(self.address)
        return before if only_here or before in addresses else addresses[0]

    def close(self) -> None:
        self._leaving = True
        try:
            for one in self._publications:  # first, so that nobody is sent here any more
                one.leave()
            for one in self._publications:
                one.close()
        finally:  # an interrupt ends the waiting for a directory, and not the endpoint's own end
            super().close()


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
        with opened(transport, options, settings) as (transports, loaded, passed_over):
            super().__init__(
                layout, transports, loaded,
                group=group, name=name, choose=choose, poison=poison, passed_over=passed_over,
            )  # fmt: skip

    def find(self, name: str, timeout: float | None = None) -> str:
        """The control address of the sender that is published as `name`, for `receive`. Blocks, up to `timeout` seconds
        (default: peer_timeout) for the name to appear, and a few more for the directory to answer.

        Raises ConfigError where no directory is set, UnknownDirectory, UnknownName, DirectoryUnavailable, BadEntry or
        VersionMismatch. A sender that was restarted is found at its new address by asking again.
        """
        with open_directory(self.settings.directory) as directory:
            return find(directory, name, self.settings.peer_timeout if timeout is None else timeout).address
