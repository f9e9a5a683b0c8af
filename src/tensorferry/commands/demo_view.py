"""What the demo shows while it runs: nothing (JSON), a line for each round, or the same lines above progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorferry.commands.demo_plan import Plan

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

MAX_BARS = 8
"""More rooms and ranks than this share one bar."""


class View:
    """Hears what the sides report. This one shows nothing."""

    def started(self, embedding: int, language: list[int]) -> None:
        """The processes have started; both arguments are process ids."""

    def ready(self, address: str, digests: list[dict[str, Any]]) -> None:
        """Every side is ready. `digests[k]`: what the embedding side computed over room k."""

    def round(self, event: dict[str, Any]) -> None:
        """A round has been gathered: room, rank, round, start, tokens, blocks, sent_tokens."""

    def room(self, event: dict[str, Any]) -> None:
        """A room is complete on one rank: room, rank, total_tokens, rounds, sent_tokens, digests."""

    def done(self, rank: int | None, event: dict[str, Any]) -> None:
        """A side has every room: free_blocks, and on language sides started, ended. `rank` None: embedding side."""

    def close(self) -> None:
        """The run has ended, well or not."""


class Both(View):
    """Passes everything on to two views."""

    def __init__(self, first: View, second: View) -> None:
        self._views = (first, second)

    def started(self, embedding: int, language: list[int]) -> None:
        for view in self._views:
            view.started(embedding, language)

    def ready(self, address: str, digests: list[dict[str, Any]]) -> None:
        for view in self._views:
            view.ready(address, digests)

    def round(self, event: dict[str, Any]) -> None:
        for view in self._views:
            view.round(event)

    def room(self, event: dict[str, Any]) -> None:
        for view in self._views:
            view.room(event)

    def done(self, rank: int | None, event: dict[str, Any]) -> None:
        for view in self._views:
            view.done(rank, event)

    def close(self) -> None:
        for view in self._views:
            view.close()


class Lines(View):
    """Plain lines, one for each round."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        settings = plan.settings
        what = "real text, through all-MiniLM-L6-v2's embedding layer" if plan.source == "text" else "random numbers"
        self.line(f"{plan.tokens} tokens of {what}: {plan.hidden_size} x {plan.dtype} each")
        pool = settings["pool_blocks"] * settings["block_size"]
        self.line(f"pool: {settings['pool_blocks']} blocks of {settings['block_size']} tokens = {pool} tokens")
        self.line(
            f"first grant: {settings['first_grant']} tokens, {settings['first_grant_mode']}; "
            f"window: {settings['window']}; transport: {settings['transport']}"
        )
        self._named = settings["transport"] != "auto"

    def line(self, text: str) -> None:
        print(text, flush=True)

    def started(self, embedding: int, language: list[int]) -> None:
        self.line(f"embedding side: process {embedding}")
        for rank, process in enumerate(language):
            self.line(f"language side{f', rank {rank}' if len(language) > 1 else ''}: process {process}")

    def ready(self, address: str, digests: list[dict[str, Any]]) -> None:
        self.line(f"the embedding side listens on {address}")

    def round(self, event: dict[str, Any]) -> None:
        first, tokens = event["start"], event["tokens"]
        if not self._named:
            self._named = True
            self.line(f"the two sides have agreed on transport {event['transport']}")
        self.line(
            f"{self._where(event)}round {event['round']}: tokens {first} to {first + tokens - 1} ({tokens}) in "
            f"{event['blocks']} {'block' if event['blocks'] == 1 else 'blocks'}; "
            f"sent_tokens {event['sent_tokens']} of {self._plan.tokens}"
        )

    def _where(self, event: dict[str, Any]) -> str:
        parts = []
        if self._plan.rooms > 1:
            parts.append(f"room {event['room']}")
        if self._plan.ranks > 1:
            parts.append(f"rank {event['rank']}")
        return " ".join(parts) + ", " if parts else ""


class Drawn(Lines):
    """The same lines on a terminal, with progress bars below them."""

    def __init__(self, plan: Plan) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._progress: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("sent_tokens {task.completed:.0f} of {task.total:.0f}"),
        )
        self._bars: dict[tuple[int, int], TaskID] = {}
        super().__init__(plan)
        self._progress.start()

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=True, soft_wrap=True)

    def ready(self, address: str, digests: list[dict[str, Any]]) -> None:
        super().ready(address, digests)
        plan = self._plan
        every = [(room, rank) for room in range(plan.rooms) for rank in range(plan.ranks)]
        if not plan.tokens:
            return
        if len(every) > MAX_BARS:
            shared = self._progress.add_task(f"{len(every)} transfers", total=plan.tokens * len(every))
            self._bars = dict.fromkeys(every, shared)
            return
        for room, rank in every:
            name = self._where({"room": room, "rank": rank}).rstrip(", ") or "embedding"
            self._bars[room, rank] = self._progress.add_task(name, total=plan.tokens)

    def round(self, event: dict[str, Any]) -> None:
        super().round(event)
        bar = self._bars.get((event["room"], event["rank"]))
        if bar is not None:
            self._progress.advance(bar, event["tokens"])

    def close(self) -> None:
        self._progress.stop()
