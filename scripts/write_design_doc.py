"""Fill in what docs/design.md takes from the code: the phase diagram and the table of messages.

python scripts/write_design_doc.py           write
python scripts/write_design_doc.py --check   exit 1 if it is out of date
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tensorferry.core import messages as m
from tensorferry.core.transfer import TRANSITIONS

DOC = Path(__file__).parent.parent / "docs" / "design.md"


def phases() -> str:
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> OPENING: receive()"]
    lines += [f"    {a.name} --> {b.name}: {why.replace(';', ',')}" for (a, b), why in TRANSITIONS.items()]
    lines += ["    CLOSING --> [*]: Closed is heard, no block in quarantine", "```"]
    return "\n".join(lines)


def messages() -> str:
    def kinds(cls: type[m.Message]) -> list[type[m.Message]]:
        found = [k for sub in cls.__subclasses__() for k in kinds(sub)]
        return found if cls.__struct_config__.tag is None else [cls, *found]

    rows = ["| message | says | fields |", "|---|---|---|"]
    for kind in kinds(m.Message):
        says = " ".join((kind.__doc__ or "I am here.").split("\n\n")[0].split())
        inherited = {"src", "dst", "min_live", "xfer"}
        fields = ", ".join(name for name in kind.__struct_fields__ if name not in inherited)
        rows.append(f"| {kind.__name__} | {says} | {fields} |")
    return "\n".join(rows)


def filled(text: str) -> str:
    for name, content in (("phases", phases()), ("messages", messages())):
        start, stop = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = re.sub(
            f"{start}.*?{stop}", lambda _, c=content, a=start, z=stop: f"{a}\n{c}\n{z}", text, flags=re.DOTALL
        )
    return text


def main() -> int:
    old = DOC.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" in sys.argv[1:]:
        if new != old:
            print("docs/design.md is out of date: run scripts/write_design_doc.py")
        return int(new != old)
    DOC.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
