"""Mutants against layers: one mechanism taken out of the machines or of the world, and who finds out.

The exhaustive search has to kill every mutant by the invariant that its mechanism is for, save those that take larger
worlds than it has; the simulation too, within 100 seeds. `new_inc_vouches` may live in the latter: by chance it takes
some ten thousand seeds. (The `zombies` profile aims at it, and finds it within a hundred.)

`python -m tensorferry.conformance.protocol.matrix` prints the table; exit 1 if a mutant lives.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tensorferry.conformance.explore.mutants import MUTANTS, Mutant
from tensorferry.conformance.explore.search import search
from tensorferry.conformance.explore.world import SearchWorld
from tensorferry.conformance.protocol.simulate.profiles import PROFILES, Profile, mutation, shaped_like
from tensorferry.conformance.protocol.simulate.run import simulate

MOST_SEEDS = 100

EXEMPT = frozenset({"new_inc_vouches"})

CHOSEN: dict[str, tuple[str, bool]] = {
    "free_on_cancel": ("chaos", False),
    "free_on_bump": ("ghosts", True),
    "timer_fence": ("transport", False),
    "fence_early": ("chaos", True),
    "undrained_ok": ("chaos", True),
    "no_flush": ("chaos", False),
    "no_flush+no_digest": ("chaos", False),
    "no_epoch_D": ("ghosts", False),
    "no_epoch_D+no_digest": ("chaos", False),
    "no_epoch_G": ("ghosts", False),
    "no_rinc": ("proofs", False),
    "no_content": ("chaos", True),
    "new_inc_vouches": ("zombies", True),
    "no_digest": ("chaos", False),
    "no_resend": ("chaos", False),
    "hold_wait": ("chaos", False),
    "no_reclaim": ("ghosts", True),
    "no_tombstone": ("heirs", False),
    "no_closed": ("ghosts", False),
    "leader_alone": ("chaos", True),
    "follower_alone": ("zombies", True),
    "forgets_proofs": ("proofs", True),
    "old_vote": ("chaos", True),
    "admitted_once": ("zombies", True),
    "late_question": ("ghosts", True),
    "introduced_once": ("proofs", True),
    "never_forgets": ("tiny", False),
    "obeys_abort": ("zombies", True),
    "begins_for_the_dead": ("heirs", False),
    "keeps_budget": ("zombies", True),
    "lends_to_the_given_up": ("zombies", True),
    "asks_the_dead": ("successors", True),
    "mute_offer": ("chaos", False),
    "mute_receiver": ("deaf", False),
}
"""The profile that kills a mutant soonest, and whether in the sizes of the search's configuration."""


@dataclass(frozen=True)
class Kill:
    """`seeds` until a mutant died, None if it lives; `violation` is what it died of."""

    mutant: str
    profile: str
    seeds: int | None
    violation: str
    seconds: float


def profile_of(mutant: Mutant) -> Profile:
    name, shaped = CHOSEN[mutant.name]
    return shaped_like(mutant.setup, PROFILES[name]) if shaped else PROFILES[name]


def kill(mutant: Mutant, most: int = MOST_SEEDS) -> Kill:
    """Simulate the mutant until it dies of what it was meant for."""
    profile, broken, began = profile_of(mutant), mutation(mutant.setup), time.perf_counter()
    for seed in range(most):
        out = simulate(profile, seed, mutation=broken)
        if mutant.killed_by(out.violation):
            return Kill(mutant.name, profile.name, seed + 1, out.violation or "", time.perf_counter() - began)
    return Kill(mutant.name, profile.name, None, "nothing found", time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tensorferry.conformance.protocol.matrix", description=__doc__)
    parser.add_argument("--simulation", action="store_true", help="without the exhaustive search")
    asked = parser.parse_args(arguments)
    alive = []
    print(f"{'mutant':21} {'search':>15}  {'simulation':>10}  profile          violation")
    for mutant in MUTANTS:
        searched = "-"
        if mutant.searched and not asked.simulation:
            out = search(SearchWorld(mutant.setup), mutant.name, limit=200_000)
            dead = mutant.killed_by(out.violation)
            searched = f"{out.states + out.after_loss} states" if dead else "LIVES"
            alive += [] if dead else [mutant.name]
        found = kill(mutant)
        lives = found.seeds is None
        alive += [mutant.name] if lives and mutant.name not in EXEMPT else []
        seeds = "LIVES" if lives else f"{found.seeds} seeds"
        print(f"{mutant.name:21} {searched:>15}  {seeds:>10}  {found.profile:16} {found.violation[:70]}", flush=True)
    print(f"{len(MUTANTS)} mutants; alive: {', '.join(alive) or 'none'}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
