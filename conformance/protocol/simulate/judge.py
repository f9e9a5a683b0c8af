"""What must be true after every step, whatever has happened before. Raises Violation; the text begins with the rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorferry.conformance.explore.search import Violation
from tensorferry.conformance.explore.views import look
from tensorferry.conformance.protocol.simulate.hosts import Host, ReceiverHost, SenderHost
from tensorferry.core.allocator import Tenant

if TYPE_CHECKING:
    from tensorferry.conformance.protocol.simulate.sea import Flight
    from tensorferry.conformance.protocol.simulate.world import World


def judge(world: World, host: Host) -> None:
    """After an event of `host`: its books (GR-1, GR-6, AL-1, LV-2), its watermarks, and the writes towards it."""
    if isinstance(host, ReceiverHost):
        view = look(host.machine, world.shape.window)
        if view.wrong:
            raise Violation(view.wrong)
        watermarks(host)
        writes(world, host, view.granted, view.quarantined)
    elif isinstance(host, SenderHost):
        wrong = look(host.machine, world.shape.window).wrong
        if wrong:
            raise Violation(wrong)


def watermarks(host: ReceiverHost) -> None:
    """WM-1: sent_tokens of one content never goes back."""
    for t in host.machine.transfers.values():
        content = t.facts.content_id if t.facts is not None else None
        now = host.machine.sent_tokens(t)
        before, mark = host.marks.get(t.xfer, (None, 0))
        if content is not None and before == content and now < mark:
            raise Violation(f"WM-1 sent_tokens of xfer {t.xfer} goes back from {mark} to {now}")
        if content is not None:
            host.marks[t.xfer] = (content, now)


def writes(world: World, host: ReceiverHost, granted: dict[int, Tenant], quarantined: dict[int, Tenant]) -> None:
    """I2, WS-6: no outstanding write may ever be able to land in a block that is not its own."""
    for f in world.sea.flights:
        if f.target == host.number and f.write[0] == host.inc and host.generation_of(f.block) == f.generation:
            _flight(f, granted, quarantined)


def _flight(f: Flight, granted: dict[int, Tenant], quarantined: dict[int, Tenant]) -> None:
    _, xfer, epoch, _ = f.write
    tenant = granted.get(f.block)
    if tenant is not None:
        if tenant != (xfer, f.host.inc, epoch, f.at):
            raise Violation(f"I2 a write of {f} may land in a block granted to {tuple(tenant)}")
        return
    tenant = quarantined.get(f.block)
    if tenant is None:
        raise Violation(f"I2 a write of {f} may land in a FREE block")
    if (tenant.xfer, tenant.sender) != (xfer, f.host.inc) or epoch > tenant.epoch:
        raise Violation(f"I2 a write of {f} may land in the quarantine of {tuple(tenant)}")
