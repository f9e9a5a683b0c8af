"""Running seeds: one, many, or many on several processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice

from tensorferry.conformance.explore.search import Violation
from tensorferry.conformance.protocol.simulate.profiles import PROFILES, SOUND, Mutation, Profile
from tensorferry.conformance.protocol.simulate.world import World

CHUNK = 100


@dataclass
class Outcome:
    """One seed. `violation` is None where everything held; `trace` only if it was asked for."""

    profile: str
    seed: int
    violation: str | None
    events: int
    simulated: float
    counts: Counter[str]
    trace: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """Replays this seed, and prints what happened step by step."""
        return (
            f"python -m tensorferry.conformance.protocol.simulate --profile {self.profile} --from {self.seed} "
            f"--seeds 1 --trace"
        )


def simulate(profile: Profile, seed: int, *, mutation: Mutation = SOUND, trace: bool = False) -> Outcome:
    """One seed: the same arguments give the same outcome and the same trace, byte for byte."""
    lines: list[str] = []
    world = World(profile, seed, trace=lines if trace else None, mutation=mutation)
    violation = None
    try:
        world.run()
    except Violation as found:
        violation = str(found)
        world.say(violation)
    return Outcome(profile.name, seed, violation, world.events, world.now, world.counts, lines)


@dataclass
class Sum:
    """Many seeds together."""

    seeds: int = 0
    events: int = 0
    simulated: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[Outcome] = field(default_factory=list)

    def add(self, other: Sum) -> None:
        self.seeds += other.seeds
        self.events += other.events
        self.simulated += other.simulated
        self.counts += other.counts
        self.failed += other.failed


def run_seeds(name: str, seeds: Iterable[int]) -> Sum:
    total = Sum()
    for seed in seeds:
        out = simulate(PROFILES[name], seed)
        part = Sum(1, out.events, out.simulated, out.counts, [out] if out.violation else [])
        total.add(part)
    return total


def chunks(names: list[str], first: int, count: int) -> Iterator[tuple[str, range]]:
    """`count` seeds of each profile from `first`, a few of each profile in turn."""
    for start in range(first, first + count, CHUNK):
        for name in names:
            yield name, range(start, min(start + CHUNK, first + count))


def run_many(names: list[str], first: int, count: int, jobs: int) -> Iterator[tuple[str, Sum]]:
    """What each piece of work came to, as it comes."""
    work = chunks(names, first, count)
    if jobs <= 1:
        for name, seeds in work:
            yield name, run_seeds(name, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        try:
            under_way = {pool.submit(run_seeds, name, seeds): name for name, seeds in islice(work, 2 * jobs)}
            while under_way:
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    name = under_way.pop(future)
                    for more, seeds in islice(work, 1):
                        under_way[pool.submit(run_seeds, more, seeds)] = more
                    yield name, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
