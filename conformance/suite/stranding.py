"""Posts to a process that is stopped, and whose writer closes: what is said of them, and what lands when it goes on."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from tensorferry.conformance.patterns import difference
from tensorferry.conformance.stage import Stage, at
from tensorferry.conformance.suite.losing import meet
from tensorferry.core.errors import BadCall, FerryError
from tensorferry.core.transport import Copy, Status


@dataclass
class Stranded:
    """Posts to a stopped process, after their writer's close."""

    landed: str = ""
    """Drained and not DONE, and what landed of it when the process went on."""
    released: int = 0
    """Not drained, and release took them."""


def stranded(stage: Stage) -> Stranded:
    told: Stranded = stage.once("stranded", lambda: _stranded(stage))
    return told


def _stranded(stage: Stage) -> Stranded:
    """What lies there while the process is stopped is read from outside. Where that is not possible, or does not tell
    because of a `flush`, sealing is the first thing that the process does when it goes on."""
    told, piece, count = Stranded(), 1 << 20, 16
    for _ in range(stage.times(1, 2, 10)):
        process, pair = meet(stage, piece * count)
        writer, source = pair.writer, pair.source(stage.pattern(piece))
        address = process.ask("address")
        process.stop()
        copies = [[Copy(source, 0, at(pair.region), n * piece, piece)] for n in range(count)]
        answers = [stage.attempt(partial(writer.post, pair.peer, each), "post") for each in copies]
        time.sleep(0.3)
        writer.close()
        posted = {n: answer for n, answer in enumerate(answers) if not isinstance(answer, FerryError)}
        drained = {n for n, handle in posted.items() if writer.drained(handle)}
        over = [[n * piece, piece] for n in drained if writer.poll(posted[n]) is not Status.DONE]
        for n in posted.keys() - drained:
            with suppress(BadCall):
                writer.release(posted[n])
                told.released += 1
        lay = None if writer.capabilities.needs_flush else _memory(process.popen.pid, address, over)
        process.tell("seal", pieces=over if lay is None else [])
        process.go_on()
        process.hear("seal")
        stage.settle()
        landed = str(process.ask("unsealed", pieces=over if lay is None else []))
        lies = _memory(process.popen.pid, address, over) if lay else None
        for (offset, _), before, after in zip(over, lay or [], lies or [], strict=False):
            landed = landed or difference(after, before, offset)
        told.landed = told.landed or landed
    return told


def _memory(pid: int, address: int, pieces: list[list[int]]) -> list[bytes] | None:
    """What lies at these [offset, nbytes] of another process's memory. None where the system does not tell."""
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            return [os.pread(memory.fileno(), nbytes, address + offset) for offset, nbytes in pieces]
    except OSError:
        return None
