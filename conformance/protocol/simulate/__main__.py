"""`python -m tensorferry.conformance.protocol.simulate`: seeds by the thousand; exit 1 if any of them breaks a rule."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from tensorferry.conformance.protocol.simulate.profiles import PROFILES
from tensorferry.conformance.protocol.simulate.run import Sum, run_many, simulate

MOST_SHOWN = 10
PROGRESS_SECONDS = 5.0


def row(name: str, total: Sum) -> str:
    c = total.counts
    crashes = c["sender crashes"] + c["receiver crashes"]
    return (
        f"{name:13} {total.seeds:8} {total.events:10} {total.simulated:11.0f} {c['delivered']:10} "
        f"{c['ended early']:11} {crashes:8} {len(total.failed):7}"
    )


HEAD = "profile          seeds     events simulated s  delivered ended early  crashes  failed"


def summary(by_name: dict[str, Sum], seconds: float, *, interrupted: bool) -> bool:
    print(HEAD)
    whole = Sum()
    for name, total in by_name.items():
        print(row(name, total))
        whole.add(total)
    print(row("all", whole))
    rate = whole.seeds / seconds if seconds else 0.0
    rest = "; interrupted: the seeds above were run, the rest were not" if interrupted else ""
    print(f"{seconds:.1f} s, {rate:.0f} seeds/s{rest}")
    for out in whole.failed[:MOST_SHOWN]:
        print(f"FAILED {out.profile} seed {out.seed}: {out.violation}\n       {out.command}")
    if len(whole.failed) > MOST_SHOWN:
        print(f"and {len(whole.failed) - MOST_SHOWN} more")
    return not whole.failed


def replay(name: str, first: int, count: int) -> bool:
    """Each seed twice: what happened is printed, and has to be the same both times."""
    fine = True
    for seed in range(first, first + count):
        out, again = (simulate(PROFILES[name], seed, trace=True) for _ in range(2))
        print(f"# {name} seed {seed}")
        print("\n".join(out.trace))
        same = out.trace == again.trace
        print(f"# {out.violation or 'every rule held'}; {'the replay is the same' if same else 'THE REPLAY DIFFERS'}")
        fine = fine and same and out.violation is None
    return fine


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tensorferry.conformance.protocol.simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="of each profile (default: %(default)s)")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="SEED", help="the first seed (default: 0)")
    parser.add_argument("--profile", default="", metavar="NAME,...", help=f"of {', '.join(PROFILES)} (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument("--trace", action="store_true", help="print every step of each seed, and replay it")
    parser.add_argument("--quiet", action="store_true", help="no progress lines on stderr")
    asked = parser.parse_args(arguments)
    names = [name for name in asked.profile.split(",") if name] or list(PROFILES)
    unknown = [name for name in names if name not in PROFILES]
    if unknown:
        parser.error(f"no such profile: {', '.join(unknown)}; there are {', '.join(PROFILES)}")
    if asked.seeds < 1 or asked.first < 0:
        parser.error("--seeds counts from 1, --from from 0")
    if asked.trace:
        held = [replay(name, asked.first, asked.seeds) for name in names]
        return 0 if all(held) else 1
    by_name = {name: Sum() for name in names}
    began = shown = time.perf_counter()
    interrupted = False
    try:
        for name, part in run_many(names, asked.first, asked.seeds, asked.jobs):
            by_name[name].add(part)
            now = time.perf_counter()
            if not asked.quiet and now - shown > PROGRESS_SECONDS:
                shown, done = now, sum(total.seeds for total in by_name.values())
                bad = sum(len(total.failed) for total in by_name.values())
                print(f"      {done} of {asked.seeds * len(names)} seeds, {bad} failed", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        interrupted = True
    fine = summary(by_name, time.perf_counter() - began, interrupted=interrupted)
    return 130 if interrupted and fine else 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
