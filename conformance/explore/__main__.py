"""`python -m tensorferry.conformance.explore`: search, print a table, exit 1 if anything that must not be true is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tensorferry.conformance.explore.configurations import EVERY, REQUIRED
from tensorferry.conformance.explore.mutants import MUTANTS
from tensorferry.conformance.explore.search import Outcome, search
from tensorferry.conformance.explore.setup import Setup
from tensorferry.conformance.explore.world import SearchWorld

HEAD = "       states     edges depth after loss  acyclic stuck  seconds  verdict"


def run(setup: Setup, limit: int, *, loud: bool) -> Outcome:
    def progress(phase: str, seen: int, waiting: int) -> None:
        if loud:
            print(f"      {setup.name} {phase}: {seen} visited, {waiting} waiting", file=sys.stderr, flush=True)

    return search(SearchWorld(setup), setup.name, compact=setup.big, limit=limit, progress=progress)


def row(out: Outcome) -> str:
    acyclic = "-" if out.acyclic is None else "yes" if out.acyclic else "NO"
    return (
        f"{out.name:5} {out.states:9} {out.transitions:9} {out.depth:5} {out.after_loss:10} {acyclic:>8} {out.stuck:5}"
        f"  {out.seconds:7.1f}  {out.verdict}"
    )


def tell(out: Outcome) -> None:
    print(f"      {out.violation}")
    for number, step in enumerate(out.trace, 1):
        print(f"      {number:3} {step}")


def configurations(setups: Sequence[Setup], limit: int, *, loud: bool) -> bool:
    print(f"at most {limit} states in each phase; P15 to P25, R10 and R11 are remembered as 64-bit hashes")
    print(HEAD)
    outcomes = []
    for setup in setups:
        out = run(setup, limit, loud=loud)
        outcomes.append(out)
        print(f"{row(out)}   {setup.about}", flush=True)
        if out.violation:
            tell(out)
    broken = [out.name for out in outcomes if out.violation]
    states = sum(out.states + out.after_loss for out in outcomes)
    bounded = [out.name for out in outcomes if out.bounded and not out.violation]
    print(
        f"{len(outcomes)} configurations, {states} states, {sum(out.seconds for out in outcomes):.0f} s; "
        f"bounded: {', '.join(bounded) or 'none'}; violated: {', '.join(broken) or 'none'}"
    )
    return not broken


def mutants(limit: int) -> bool:
    alive = []
    for mutant in MUTANTS:
        out = run(mutant.setup, limit, loud=False)
        dead = mutant.killed_by(out.violation)
        alive += [] if dead else [mutant.name]
        print(f"{'dies' if dead else 'LIVES':5} {mutant.name:22} {out.states + out.after_loss:7} states  "
              f"{out.seconds:5.1f} s  {mutant.about}: {out.violation or 'nothing found'}", flush=True)  # fmt: skip
    print(f"{len(MUTANTS) - len(alive)} of {len(MUTANTS)} mutants die; alive: {', '.join(alive) or 'none'}")
    return not alive


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tensorferry.conformance.explore", description=__doc__)
    parser.add_argument("--all", action="store_true", help="the big configurations and the mutants too")
    parser.add_argument("--only", default="", metavar="P3,O2", help="these configurations")
    parser.add_argument("--mutants", action="store_true", help="only the mutants")
    parser.add_argument("--limit", type=int, default=1_500_000, help="most states in each phase (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress lines on stderr")
    asked = parser.parse_args(arguments)
    names = [name for name in asked.only.split(",") if name]
    unknown = sorted(set(names) - {setup.name for setup in EVERY})
    if unknown:
        parser.error(f"no such configuration: {', '.join(unknown)}; there are {', '.join(s.name for s in EVERY)}")
    if asked.mutants:
        return 0 if mutants(asked.limit) else 1
    setups = [s for s in EVERY if s.name in names] if names else EVERY if asked.all else REQUIRED
    fine = configurations(setups, asked.limit, loud=not asked.quiet)
    if asked.all and not names:
        fine = mutants(asked.limit) and fine
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
