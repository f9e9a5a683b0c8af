"""A process that carries checks out: `python -m tensorferry.conformance.worker SETUP`, one rule's id a line.

It answers each with a line of JSON. After a check that timed out it ends, since a thread of that check is still at
work; whoever asks starts another.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from typing import IO, Any

import msgspec

from tensorferry.conformance.hooks import load
from tensorferry.conformance.judge import Setup, judge, usable
from tensorferry.conformance.model import SuiteError, Tier, checks
from tensorferry.conformance.peer import reserve_stdout
from tensorferry.conformance.target import Spec, remember_environment, resolve
from tensorferry.core.errors import FerryError


class Order(msgspec.Struct, frozen=True):
    """What a worker is started with."""

    spec: Spec
    hooks: str
    seed: int
    tier: int


def main() -> int:
    out = reserve_stdout()
    faulthandler.enable()
    remember_environment()
    order = msgspec.json.decode(sys.argv[1], type=Order)
    try:
        setup = Setup(resolve(order.spec.name, order.spec.options), load(order.hooks), order.seed, Tier(order.tier))
    except FerryError as error:
        _say(out, {"ferry": error.code, "cause": error.cause, "hint": error.hint})
        return 1
    _say(out, {"ready": True})
    for line in sys.stdin:
        rule = line.strip()
        if rule == "probe":
            works, reason = usable(setup.target)
            _say(out, {"usable": works, "reason": reason})
            continue
        try:
            finding = judge(setup, checks()[rule])
        except SuiteError as error:
            _say(out, {"suite": str(error)})
            continue
        _say(out, msgspec.to_builtins(finding))
        if finding.message.startswith("timed out"):
            os._exit(0)
    os._exit(0)  # an engine's threads and destructors cannot change anything any more


def _say(out: IO[str], answer: Any) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
