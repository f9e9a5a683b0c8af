"""One check, carried out: in a thread with a watchdog, and turned into a finding."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorferry.conformance.hooks import Hooks
from tensorferry.conformance.model import (
    Check,
    Finding,
    Inconclusive,
    NotApplicable,
    SuiteError,
    Tier,
    Verdict,
    Violation,
)
from tensorferry.conformance.patience import FACTOR
from tensorferry.conformance.rules import Rule, rules
from tensorferry.conformance.stage import Stage, declares
from tensorferry.conformance.target import Target
from tensorferry.core.errors import Unsupported
from tensorferry.core.transport import Capabilities

HERE = str(Path(__file__).parent)
"""As frames name it: in an editable install it is reached through a link."""

VERBS = {"cancellable": "cancel", "needs_flush": "flush", "wakes": "on_progress"}
"""The verbs that a capability stands for: undeclared, they are refused."""


@dataclass(frozen=True)
class Setup:
    """What all checks of a run share."""

    target: Target
    hooks: Hooks
    seed: int
    tier: Tier
    shared: dict[str, Any] = field(default_factory=dict)
    """What several rules look at and one of them has brought about (`Stage.once`)."""


@dataclass
class _Outcome:
    verdict: Verdict | None = None
    message: str = ""
    evidence: dict[str, str] = field(default_factory=dict)


def judge(setup: Setup, check: Check) -> Finding:
    """Carry a check out. Raises SuiteError for a defect of the check itself."""
    stage = Stage(check.rule, setup.target, setup.hooks, setup.seed, setup.tier, setup.shared)
    outcome = _Outcome()
    thread = threading.Thread(target=_run, args=(stage, check, outcome), name=f"check-{check.rule}", daemon=True)
    begun = time.monotonic()
    limit = limit_s(check, setup.tier)
    thread.start()
    thread.join(limit)
    took = time.monotonic() - begun
    if thread.is_alive():
        where = _where(thread)
        for process in stage._processes:
            process.popen.kill()
        return Finding(
            check.rule,
            Verdict.FAIL,
            f"timed out: the check did not end within {limit:g} s; it was in {where[0]}",
            {**stage.evidence, "stack": "\n".join(where)},
            took,
        )
    if outcome.verdict is None:
        raise SuiteError(f"the check of {check.rule} is defective: {outcome.message}")
    return Finding(check.rule, outcome.verdict, outcome.message, {**stage.evidence, **outcome.evidence}, took)


def limit_s(check: Check, tier: Tier) -> float:
    return check.seconds * (1, 1, 4)[tier] * FACTOR


def _run(stage: Stage, check: Check, outcome: _Outcome) -> None:
    try:
        _applies(stage, rules()[check.rule])
        check.function(stage)
        outcome.verdict = Verdict.PASS
    except Violation as error:
        outcome.verdict, outcome.message = Verdict.FAIL, str(error)
    except Inconclusive as error:
        outcome.verdict, outcome.message = Verdict.INCONCLUSIVE, str(error)
    except NotApplicable as error:
        outcome.verdict, outcome.message = Verdict.NOT_APPLICABLE, str(error)
    except BaseException as error:  # noqa: BLE001 - whose it is is what is found out here; SystemExit is told, too
        text = "".join(traceback.format_exception(error))
        outcome.evidence["traceback"] = text
        verb = _raised_by(error.__traceback__)
        if verb:
            outcome.verdict, outcome.message = Verdict.FAIL, f"{verb} raised {type(error).__name__}: {error}"
        else:
            outcome.message = text
    finally:
        problems = stage.close()
        if problems:
            outcome.evidence["close"] = "; ".join(problems)


def _raised_by(trace: TracebackType | None) -> str:
    """The call out of the suite in which an error was raised; empty where it was raised in the suite itself."""
    frames = traceback.extract_tb(trace)
    inside = [number for number, frame in enumerate(frames) if frame.filename.startswith(HERE)]
    last = inside[-1] if inside else -1
    if last + 1 >= len(frames):
        return ""
    return f"{frames[last + 1].name} (called as `{(frames[last].line or '').strip()}`)"


def _where(thread: threading.Thread) -> list[str]:
    """The stack of a thread, the innermost call first."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return ["a call that has ended by now"]
    stack = traceback.extract_stack(frame)
    return [f"{entry.name} ({Path(entry.filename).name}:{entry.lineno})" for entry in reversed(stack)]


def _applies(stage: Stage, rule: Rule) -> None:
    """Raise NotApplicable where what the rule needs is not declared, once that is seen to be refused."""
    if not rule.needs:
        return
    cls = stage.target.cls
    # Whether it needs a flush, only an instance may know.
    known = cls is not None and "needs_flush" not in rule.needs
    capabilities = cls.capabilities if cls is not None and known else stage.open().capabilities
    if not isinstance(capabilities, Capabilities):
        raise Inconclusive(f"capabilities is a {type(capabilities).__name__} (HYG-7)")
    missing = [need for need in rule.needs if not declares(capabilities, need)]
    if not missing:
        return
    refusals(stage, [need for need in missing if need in VERBS])
    raise NotApplicable(", ".join(_undeclared(need) for need in missing))


def refusals(stage: Stage, needs: list[str]) -> None:
    """Expect Unsupported, by name, of the verb behind each of these capabilities, which are not declared."""
    if not needs:
        return
    pair = stage.pair(64)
    handle = pair.post(b"x")
    calls = {
        "cancellable": lambda: pair.writer.cancel(handle),
        "needs_flush": lambda: pair.owner.flush(pair.region),
        "wakes": lambda: pair.writer.on_progress(lambda: None),
    }
    for need in needs:
        verb = VERBS[need]
        error = stage.refused(calls[need], Unsupported, what=f"{verb}, which is not declared ({need}),")
        stage.expect(
            need in str(error) or verb in str(error), f"{verb} is refused by a message without its name: {error}"
        )
    stage.end(pair.writer, handle)


def _undeclared(need: str) -> str:
    return f"declares {need[1:]}" if need.startswith("!") else f"does not declare {need}"


def usable(target: Target) -> tuple[bool, str]:
    """Whether the transport's probe says that it works here. One that raises is HYG-1's affair: the run goes on."""
    if target.cls is None:
        return True, ""
    try:
        answer = target.cls.probe()
        return bool(answer.usable), f"{answer.readiness}: {answer.reason}. {answer.hint}".strip()
    except Exception as error:  # noqa: BLE001
        return True, f"its probe raised {type(error).__name__}: {error}"
