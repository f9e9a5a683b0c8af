"""What `send` and `receive` show while they run: nothing, plain lines, or the same lines above a moving one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tensorferry.commands.output import Output

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_SECONDS = 1.0
"""Without a terminal a line of progress is printed this often, at most."""


def in_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class View:
    """This one shows nothing."""

    def line(self, text: str) -> None:
        """A line that stays."""

    def wait(self, text: str) -> None:
        """What is being waited for."""

    def progress(self, tokens: int, total: int, token_bytes: int, rounds: int | None = None) -> None:
        """`tokens` of `total` have arrived, in `rounds` finished rounds, where this side counts them."""

    def close(self) -> None:
        """The command has ended, well or not."""


class Lines(View):
    """Plain lines."""

    def __init__(self) -> None:
        self._waiting = ""
        self._began = 0.0
        self._last = 0.0
        self._shown = -1

    def line(self, text: str) -> None:
        print(text, flush=True)

    def wait(self, text: str) -> None:
        if text != self._waiting:
            self._waiting = text
            self._began = 0.0  # what moves next is another transfer, or the same after a pause
            self.line(text)

    def progress(self, tokens: int, total: int, token_bytes: int, rounds: int | None = None) -> None:
        now = time.monotonic()
        self._began = self._began or now
        if tokens == self._shown or (now - self._last < LINE_SECONDS and tokens < total):
            return
        self._last, self._shown = now, tokens
        spent = now - self._began
        rate = f", {in_bytes(tokens * token_bytes / spent)}/s" if spent > 0 else ""
        self.line(
            f"{tokens} of {total} tokens, {in_bytes(tokens * token_bytes)} of {in_bytes(total * token_bytes)}"
            f"{rate}{_in_rounds(rounds)}"
        )


def _in_rounds(rounds: int | None) -> str:
    return "" if rounds is None else f", {rounds} {'round' if rounds == 1 else 'rounds'}"


class Drawn(View):
    """A terminal: what is being waited for, then a bar with bytes, rate and rounds."""

    def __init__(self) -> None:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress: Progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(), transient=True
        )
        self._task: TaskID | None = None
        self._moving = False
        self._progress.start()

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def wait(self, text: str) -> None:
        if self._moving or self._task is None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._moving = self._progress.add_task(text, total=None), False
        self._progress.update(self._task, description=text)

    def progress(self, tokens: int, total: int, token_bytes: int, rounds: int | None = None) -> None:
        if not self._moving or self._task is None:
            self._start_bar(total * token_bytes)
        assert self._task is not None
        self._progress.update(
            self._task,
            completed=tokens * token_bytes,
            description=f"{tokens} of {total} tokens{_in_rounds(rounds)}",
        )

    def _start_bar(self, nbytes: int) -> None:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        if self._task is not None:
            self._progress.remove_task(self._task)
        self._progress.columns = (
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self._task, self._moving = self._progress.add_task("", total=nbytes), True

    def close(self) -> None:
        self._progress.stop()


def view_for(out: Output) -> View:
    if out.json:
        return View()
    return Drawn() if out.styled else Lines()
