"""`tensorferry config show`: the settings that hold here, and where each came from."""

from __future__ import annotations

import argparse
import os
from typing import Any

from tensorferry.commands import examining, probing
from tensorferry.commands.flags import add_settings, load_settings, setting_names
from tensorferry.commands.output import Exit, Output
from tensorferry.core.settings import descriptions

_EXAMPLES = """\
examples:
  tensorferry config show --origin
  TENSORFERRY_WINDOW=rounds tensorferry config show --origin
  tensorferry config show --format json | jq .settings.block_size
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("config", help="show the settings and where each value comes from")
    inner = parser.add_subparsers(dest="config_command", metavar="COMMAND", required=True)
    show = inner.add_parser(
        "show",
        parents=[common],
        help="the settings that hold here",
        description="Show every setting as it holds here. A value is looked up in this order: argument, command line, "
        "TENSORFERRY_<NAME> in the environment, the names of earlier deployments, the TOML file, the default. With "
        "--origin also the variables of engines that a transport sets when it is opened, unless they are set already.",
        epilog=_EXAMPLES,
        usage="%(prog)s [--origin] [flags]",
    )
    show.add_argument("--origin", action="store_true", help="say where each value comes from")
    add_settings(show.add_argument_group("settings, as other commands take them"), setting_names())
    show.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> Exit:
    loaded = load_settings(args)
    values = loaded.settings.as_dict()
    if out.json:
        shown: dict[str, Any] = {"status": "ok", "settings": values}
        if args.origin:
            shown["origins"] = {
                name: {"kind": str(origin.kind), "detail": origin.detail} for name, origin in loaded.origins.items()
            }
            shown["engine_variables"] = _engine_variables()
        out.object(shown)
        return Exit.OK
    columns = ["setting", "value", "unit", "origin"] if args.origin else ["setting", "value", "unit"]
    rows = [
        [about.name, _text(values[about.name]), about.unit, str(loaded.origins[about.name])][: len(columns)]
        for about in descriptions()
    ]
    out.table(columns, rows)
    variables = _engine_variables() if args.origin else []
    if variables:
        out.line()
        out.table(
            ["engine variable", "value", "origin", "why"],
            [[v["name"], v["value"], v["origin"], v["reason"]] for v in variables],
        )
    return Exit.OK


def _engine_variables() -> list[dict[str, str]]:
    """What each installed transport sets when it is opened, and what holds: the user's own value wins."""
    from tensorferry.plugins import registry

    distributions: dict[str, set[str]] = {}
    for plugin in registry.available():
        distributions.setdefault(plugin.name, set()).add(plugin.distribution)
    foreign = [name for name, theirs in distributions.items() if theirs != {"tensorferry"}]
    told = probing.ask_each(foreign, lambda name: examining.ask_variables(name, probing.DEFAULT_SECONDS))
    found = []
    for name in distributions:
        # Of ours none imports its engine for this; what others import may crash, or hang.
        for variable in told[name] if name in told else examining.variables(name):
            theirs = os.environ.get(variable.name)
            found.append({
                "name": variable.name,
                "value": variable.value if theirs is None else theirs,
                "origin": f"tensorferry, for {name}" if theirs is None else "environment",
                "transport": name,
                "reason": variable.reason,
            })  # fmt: skip
    return found


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
