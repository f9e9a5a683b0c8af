"""What the demo found, as the object whose form schemas/demo.json fixes."""

from __future__ import annotations

from typing import Any

from tensorferry.commands.demo_plan import Plan
from tensorferry.commands.demo_view import View
from tensorferry.core.errors import FerryError, IntegrityError
from tensorferry.core.layout import embedding_layout


class Report(View):
    """Gathers what the sides say; `finish` makes the object."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._digests: list[dict[str, Any]] = []
        self._rooms: dict[tuple[int, int], dict[str, Any]] = {}
        self._free: dict[str, int] = {}
        self._transport = plan.settings["transport"]
        self._times: list[tuple[float, float]] = []

    def ready(self, address: str, digests: list[dict[str, Any]]) -> None:
        self._digests = digests

    def round(self, event: dict[str, Any]) -> None:
        so_far = self._room(event["room"], event["rank"])
        so_far["rounds"].append({name: event[name] for name in ("round", "start", "tokens", "blocks")})
        so_far["sent_tokens"].append(event["sent_tokens"])

    def room(self, event: dict[str, Any]) -> None:
        entry = self._room(event["room"], event["rank"])
        for name in ("total_tokens", "rounds", "sent_tokens"):
            entry[name] = event[name]
        if (event["room"], event["rank"]) == (0, 0) and event["transport"]:
            self._transport = event["transport"]
        entry["verified"] = event["digests"] == self._digests[event["room"]]

    def done(self, rank: int | None, event: dict[str, Any]) -> None:
        if rank is None:
            self._free["sender"] = event["free_blocks"]
            return
        self._free["receiver" if self._plan.ranks == 1 else f"receiver.{rank}"] = event["free_blocks"]
        self._times.append((event["started"], event["ended"]))

    def _room(self, room: int, rank: int) -> dict[str, Any]:
        fresh = {
            "room": room,
            "rank": rank,
            "total_tokens": self._plan.tokens,
            "rounds": [],
            "sent_tokens": [],
            "verified": False,
        }
        return self._rooms.setdefault((room, rank), fresh)

    def mismatch(self) -> IntegrityError | None:
        """The error to fail with where some room did not arrive as it was sent."""
        wrong = sorted(key for key, entry in self._rooms.items() if not entry["verified"])
        if not wrong:
            return None
        room, rank = wrong[0]
        return IntegrityError(
            f"what arrived is not what was sent ({len(wrong)} of {len(self._rooms)} transfers; rank {rank} first)",
            room=room,
        )

    def finish(self, error: FerryError | None) -> dict[str, Any]:
        """The object. With an error it holds what was known when the run ended."""
        plan = self._plan
        first = self._room(0, 0)
        every = [self._rooms[key] for key in sorted(self._rooms)]
        expected = plan.rooms * plan.ranks
        verified = error is None and len(every) == expected and all(entry["verified"] for entry in every)
        moved = sum(entry["sent_tokens"][-1] for entry in every if entry["sent_tokens"])
        nbytes = moved * embedding_layout(plan.hidden_size, plan.dtype).token_bytes
        seconds = (
            max(ended for _, ended in self._times) - min(started for started, _ in self._times) if self._times else 0.0
        )
        made: dict[str, Any] = {
            "status": "failed" if error else "ok",
            "transport": self._transport,
            "source": plan.source,
            "hidden_size": plan.hidden_size,
            "dtype": plan.dtype,
            "total_tokens": first["total_tokens"],
            "bytes": nbytes,
            "verified": verified,
            "seconds": seconds,
            "goodput_bytes_per_s": nbytes / seconds if seconds > 0 else 0.0,
            "rounds": first["rounds"],
            "sent_tokens": first["sent_tokens"],
            "pool_blocks": plan.settings["pool_blocks"],
            "free_blocks_after": dict(
                sorted(self._free.items(), key=lambda side: (side[0] != "sender", len(side[0]), side[0]))
            ),
            "ranks": plan.ranks,
            "rooms": plan.rooms,
            "per_room": every,
        }
        if error is not None:
            made["error"] = error.as_dict()
        return made
