"""What would carry from a sender to an endpoint here: `python -m tensorferry.commands.surveying …`.

The child asks the sender, opens what an endpoint with the same settings would open, and tries each transport that both
have. Transports are foreign code: one that crashes or hangs while it is opened does so to an endpoint as well, and must
not do so to the command that is to say it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorferry.commands import probing
from tensorferry.core.errors import FerryError, TransportUnavailable
from tensorferry.core.selection import Verdict
from tensorferry.core.settings import Settings

START_SECONDS = 5.0
"""For the child's own start, which is nobody's answer: so that a short time-out is the peer's."""


@dataclass(frozen=True)
class Survey:
    """What a sender offers, against what is open here."""

    address: str
    name: str
    verdicts: Sequence[Verdict]
    no_way: FerryError | None = None
    """What a receiver here would fail with, where no transport joins the two sides."""

    @property
    def chosen(self) -> str | None:
        return next((v.name for v in self.verdicts if v.viable), None)

    def as_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "address": self.address,
            "name": self.name,
            "chosen": self.chosen,
            "transports": [
                {"name": v.name, "path": v.path, "viable": v.viable, "reason": v.reason} for v in self.verdicts
            ],
        }
        return told | ({"error": self.no_way.as_dict()} if self.no_way is not None else {})


def survey(address: str, settings: Settings, seconds: float, *, debug: bool = False) -> Survey:
    """Ask the sender at a control address for at most so long, and try for as long again what joins it to this side.

    Raises PeerUnreachable and its kin, what an endpoint with these settings fails with when it opens its transports,
    and TransportUnavailable where they crash or hang.
    """
    order = {"address": address, "seconds": seconds, "transport": settings.transport, "require": settings.require}
    limit = START_SECONDS + 2 * seconds
    ended = probing.run_child(__spec__.name, json.dumps(order), seconds=limit, debug=debug)
    try:
        told = json.loads(ended.said)
    except ValueError:
        hint = "An endpoint here fares the same. `tensorferry doctor` says which transport does it: uninstall it, or "
        hint += "name another one with --transport"
        if not ended.started:
            hint = probing.NOT_STARTED
        last = f'. It last said: "{ended.last_words}"' if ended.last_words else ""
        raise TransportUnavailable(
            "opening the transports that an endpoint with these settings opens, and trying them: "
            f"the process {ended.how or 'said nothing'}{last}",
            hint=hint,
        ) from None
    error = probing.error_of(told["error"]) if told["error"] else None
    if error is not None and "verdicts" not in told:
        raise error
    return Survey(address, told["name"], [Verdict(**one) for one in told["verdicts"]], error)


# ---- in the child ------------------------------------------------------------------------------------------------


def _survey(address: str, seconds: float, transport: str, require: str) -> dict[str, Any]:
    from tensorferry.core.asking import ask
    from tensorferry.core.carriers import Carriers
    from tensorferry.core.memory import HOST
    from tensorferry.plugins.opening import opened

    hello = ask(address, seconds)
    with opened(transport, None, {"require": require}) as (found, settings, passed_over):
        place = HOST
        if settings.pool_device != HOST.kind:  # torch is needed for nothing else here
            from tensorferry.core import devices

            place = devices.place("pool_device", settings.pool_device)
        carriers = Carriers(found, require=settings.require, place=place, passed_over=passed_over)
        reach, _ = carriers.survey(hello, address)
        error: FerryError | None = None
        if not reach.lanes:
            try:
                carriers.reach(hello, address)
            except FerryError as no_way:
                error = no_way
        reach.disconnect()
        return {
            "name": hello.name,
            "verdicts": [
                {"name": v.name, "path": v.path, "viable": v.viable, "reason": probing.one_line(v.reason)}
                for v in reach.verdicts
            ],
            "error": error and error.as_dict(),
        }


def main() -> int:
    own, (order,) = probing.begin()
    try:
        told = _survey(**json.loads(order))
    except FerryError as error:
        told = {"error": error.as_dict()}
    print(json.dumps(told), file=own, flush=True)
    os._exit(0)  # what is open ends with the process; an engine's end cannot change the answer any more


if __name__ == "__main__":
    sys.exit(main())
