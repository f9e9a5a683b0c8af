"""Write docs/settings.md from core/settings.py. `--check` only says whether the file is in step (exit 1 if not)."""

from __future__ import annotations

import sys
from pathlib import Path

from tensorferry.core.settings import NOT_SETTINGS, Description, descriptions

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

INTRODUCTION = """\
# Settings

<!-- Written by scripts/write_settings_doc.py from core/settings.py: change the settings there, then run it. -->

Every setting has one default, documented in one place. A value is looked up in this order, and the first hit wins:

1. an argument of `tf.Sender(...)` or `tf.Receiver(...)`, by the setting's name
2. a flag of the command line: `--first-grant` for `first_grant`
3. the environment: `TENSORFERRY_FIRST_GRANT`
4. a name of an earlier deployment (last column), also in the environment
5. the TOML file: `first_grant = 8192`, in `tensorferry.toml` of the working directory
6. the default

`tensorferry config show --origin` says which value holds and where it comes from. Names that are not settings are
errors, with the nearest known name. Bytes may be written `4GiB` (1024-based) or `512MB` (1000-based), times `90s`,
`500ms` or `5min`. An environment variable that is set to nothing counts as not set.
"""


def value(about: Description) -> str:
    """The default as a reader would write it."""
    if about.unit == "bytes":
        for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB")):
            if about.default % factor == 0:
                return f"`{about.default // factor}{unit}`"
    number = f"{about.default:g}" if isinstance(about.default, float) else str(about.default)
    return f"`{number}`" + (f" {about.unit}" if about.unit and not isinstance(about.default, str) else "")


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    lines = [
        INTRODUCTION,
        row("setting", "default", "meaning", "where the default comes from", "environment", "earlier name"),
        "|---|---|---|---|---|---|",
    ]
    for about in descriptions():
        earlier = ", ".join(f"`{alias}`" for alias in about.aliases)
        lines.append(
            row(f"`{about.name}`", value(about), about.meaning, about.source, f"`{about.environment}`", earlier)
        )
    lines += ["", "Environment variables that are not settings:", "", row("variable", "meaning"), "|---|---|"]
    lines += [row(f"`{name}`", meaning) for name, meaning in NOT_SETTINGS.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
