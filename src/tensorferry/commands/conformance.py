"""`tensorferry conformance`: the suite that every transport has to pass, against one of them, and its rules."""

from __future__ import annotations

import argparse
import secrets
import shlex
from typing import TYPE_CHECKING, Any

from tensorferry.commands.output import BadFlag, Exit, Output
from tensorferry.core.errors import ConfigError, TransportUnavailable

if TYPE_CHECKING:
    from tensorferry.conformance.model import Finding
    from tensorferry.conformance.rules import Rule
    from tensorferry.conformance.runner import Report

_EXAMPLES = """\
examples:
  tensorferry conformance run shm                       every rule, about a minute
  tensorferry conformance run mine --rules XFR,BND-3    two families or rules, while you work on them
  tensorferry conformance run mine -o host=127.0.0.1 --tier all --report results
  tensorferry conformance run mine --known-failures ferry-known-failures.txt --hooks mine.testing:Hooks
  tensorferry conformance rules --rules FEN             what a family asks for, and why

exit status: 0 conforms, 1 a rule failed, 2 wrong usage, 3 cannot run here, 4 the suite itself is defective
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    top = commands.add_parser(
        "conformance",
        help="hold a transport to the numbered rules",
        description="Run the conformance suite against a transport, or list its rules (docs/conformance.md).",
        epilog=_EXAMPLES,
    )
    verbs = top.add_subparsers(dest="verb", metavar="run|rules", required=True)
    _add_run(verbs, common)
    listing = verbs.add_parser("rules", parents=[common], help="list the rules", description="List the rules.")
    _add_choice(listing)
    listing.set_defaults(run=show_rules)


def _add_run(verbs: Any, common: argparse.ArgumentParser) -> None:
    parser = verbs.add_parser(
        "run",
        parents=[common],
        help="run the suite against one transport",
        description="Run the conformance suite against one transport: an entry point's name, or module:Class.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("name", metavar="NAME", help="an installed transport, or module:Class")
    parser.add_argument("-o", "--option", action="append", default=[], metavar="KEY=VALUE", help="one of its options")
    _add_choice(parser)
    parser.add_argument(
        "--tier", choices=("quick", "verify", "all"), default="verify", help="how much is tried (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of all random choices (default: a new one, shown)")
    parser.add_argument("--report", metavar="DIR", help="write report.json, junit.xml and report.md there")
    parser.add_argument("--hooks", default="", metavar="M:C", help="your hooks, a class of a module")
    parser.add_argument("--known-failures", metavar="FILE", help="rules that are known to fail, with reasons; strict")
    parser.add_argument("--strict", action="store_true", help="a failed SHOULD or MAY rule fails the run, too")
    parser.set_defaults(run=run)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rules", default="", metavar="IDS", help="ids, families, or `transport`, `protocol`: RES,XFR-2"
    )
    parser.add_argument("--level", default="", metavar="LEVEL", help="only rules of this level and above: MUST, SHOULD")


def run(args: argparse.Namespace, out: Output) -> Exit:
    from tensorferry.conformance import report as writing
    from tensorferry.conformance.runner import run as run_suite

    seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
    out.line(f"{args.name}: tier {args.tier}, seed {seed}")
    try:
        report = run_suite(
            args.name,
            _options(args.option),
            rules=args.rules,
            level=args.level,
            tier=args.tier,
            seed=seed,
            hooks=args.hooks,
            known_failures=args.known_failures,
            on_finding=lambda finding: _show(finding, out),
        )
    except TransportUnavailable:
        raise
    except ConfigError as error:
        raise BadFlag(error.cause, hint=error.hint) from error
    files = writing.write(report, args.report, strict=args.strict) if args.report else []
    if out.json:
        out.object(writing.as_dict(report, strict=args.strict))
    else:
        _sum_up(report, args, out)
        for file in files:
            out.line(f"written: {file}")
    return Exit(report.exit_code(strict=args.strict))


def show_rules(args: argparse.Namespace, out: Output) -> Exit:
    from tensorferry.conformance.rules import select

    try:
        chosen = select(args.rules, args.level)
    except ConfigError as error:
        raise BadFlag(error.cause, hint=error.hint) from error
    if out.json:
        out.object({"rules": [rule.as_dict() for rule in chosen]})
    else:
        out.table(["rule", "level", "kind", "text"], [[r.id, r.level.name, _kind(r), r.text] for r in chosen])
    return Exit.OK


def _kind(rule: Rule) -> str:
    if rule.by:
        return "by " + ", ".join(rule.by)
    return f"{rule.kind}: {rule.where}" if rule.where else str(rule.kind)


def _options(given: list[str]) -> dict[str, object]:
    options: dict[str, object] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise BadFlag(f"-o {item} is no KEY=VALUE")
        options[name] = value
    return options


def _show(finding: Finding, out: Output) -> None:
    word = str(finding.verdict)
    out.line(f"{finding.rule:7} {word:15} {finding.message}".rstrip())
    if word == "fail":
        for name in ("stack", "stderr"):
            for line in finding.evidence.get(name, "").splitlines()[:6]:
                out.line(f"{'':24}{line}")


def _again(args: argparse.Namespace, failed: list[Finding], seed: int) -> str:
    """The command that runs what has failed again, with the same random choices."""
    words = ["tensorferry", "conformance", "run", args.name, *(f"-o={item}" for item in args.option)]
    words += ["--tier", args.tier] if args.tier != "verify" else []
    words += ["--hooks", args.hooks] if args.hooks else []
    words += ["--rules", ",".join(finding.rule for finding in failed), "--seed", str(seed)]
    return shlex.join(words)


def _sum_up(report: Report, args: argparse.Namespace, out: Output) -> None:
    from tensorferry.conformance.report import summary

    out.line()
    counted = ", ".join(f"{count} {verdict}" for verdict, count in summary(report).items() if count)
    out.line(f"{report.target.name}: {counted}; {report.seconds:.0f} s, seed {report.seed}")
    for defect in report.defects:
        out.line(f"defect of the suite: {defect.splitlines()[-1]}")
    failed = report.failed(strict=args.strict)
    if failed:
        out.line(f"does not conform. Again: {_again(args, failed, report.seed)}")
    elif not report.defects:
        out.line("conforms")
