"""Is SGLang's interface still what the adapter has?   python tests/plugins/sglang_drift.py [FOLDER]

FOLDER is where `pip install --no-deps --target FOLDER sglang` has put it; without one, the `sglang` that Python finds
is taken. Its `srt/disaggregation/base/conn.py` is read and not imported, so nothing that SGLang depends on is needed.
Prints every difference that a caller would notice. Exit status: 0 none, 1 some, 3 there is no SGLang to compare with.
`make sglang-signatures` installs the newest and runs this.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from tensorferry.plugins import sglang as ours

CONN = Path("srt", "disaggregation", "base", "conn.py")

PAIRS: dict[str, tuple[type, ...]] = {
    "BaseKVManager": (ours.FerryKVManager,),
    "BaseKVSender": (ours.FerryKVSender,),
    "BaseKVReceiver": (ours.FerryKVReceiver, ours.FerryFakeReceiver),
}

LEFT_OUT = {
    ("BaseKVSender", "mark_prefill_complete"): "of an allocation policy of the KV cache, off unless it is asked for",
}
"""What SGLang's classes have and ours do not, with the reason."""


def drift(source: str) -> list[str]:
    """Every difference between `source`, the text of SGLang's conn.py, and the adapter."""
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    found: list[str] = []
    for name, counterparts in PAIRS.items():
        if name not in classes:
            found.append(f"SGLang has no {name} any more")
            continue
        for member in classes[name].body:
            for mine in counterparts:
                found += _member(name, member, mine)
    for name in ("KVPoll", "KVTransferMetric"):
        if name not in classes:
            found.append(f"SGLang has no {name} any more")
    if "KVPoll" in classes:
        theirs, mine_ = _values(classes["KVPoll"]), {poll.name: int(poll) for poll in ours.KVPoll}
        if theirs != mine_:
            found.append(f"KVPoll is {theirs}, and ours {mine_}")
    if "KVTransferMetric" in classes:
        fields = [name for line in classes["KVTransferMetric"].body for name in _named(line)]
        own = list(inspect.signature(ours.KVTransferMetric).parameters)
        if fields != own:
            found.append(f"KVTransferMetric has {fields}, and ours {own}")
    return found


def _member(name: str, member: ast.stmt, mine: type) -> list[str]:
    if isinstance(member, ast.FunctionDef):
        if (name, member.name) in LEFT_OUT:
            return []
        attribute = inspect.getattr_static(mine, member.name, None)
        if attribute is None:
            return [f"{mine.__name__} lacks {member.name}, which {name} has"]
        if any(isinstance(d, ast.Name) and d.id == "property" for d in member.decorator_list):
            return []
        return [f"{mine.__name__}.{member.name}: {what}" for what in _calls(member.args, attribute)]
    return [f"{mine.__name__} lacks {n}, which {name} has" for n in _named(member) if not hasattr(mine, n)]


def _calls(theirs: ast.arguments, mine: Any) -> list[str]:
    """What of a call that fits `theirs` does not fit `mine`: names, places, and what may be left out."""
    have = dict(inspect.signature(mine).parameters)
    positional = [p.name for p in have.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [arg.arg for arg in (*theirs.posonlyargs, *theirs.args)]
    optional = set(names[len(names) - len(theirs.defaults) :]) if theirs.defaults else set()
    found = []
    for place, name in enumerate(names):
        if name not in have:
            found.append(f"does not take {name!r}")
        elif positional[place : place + 1] != [name]:
            found.append(f"{name!r} is not in place {place}")
        elif name in optional and have[name].default is inspect.Parameter.empty:
            found.append(f"{name!r} may not be left out")
    for arg, default in zip(theirs.kwonlyargs, theirs.kw_defaults, strict=True):
        if arg.arg not in have:
            found.append(f"does not take {arg.arg!r}")
        elif default is not None and have[arg.arg].default is inspect.Parameter.empty:
            found.append(f"{arg.arg!r} may not be left out")
    return found


def _named(node: ast.stmt) -> list[str]:
    """The names that a line of a class body gives a value or a type."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _values(node: ast.ClassDef) -> dict[str, Any]:
    return {
        target.id: ast.literal_eval(line.value)
        for line in node.body
        if isinstance(line, ast.Assign)
        for target in line.targets
        if isinstance(target, ast.Name)
    }


def find(folder: str | None) -> Path | None:
    """SGLang's conn.py. Finding the package runs none of its code."""
    if folder is not None:
        roots = [Path(folder) / "sglang"]
    else:
        spec = importlib.util.find_spec("sglang")
        roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec is not None else []
    return next((root / CONN for root in roots if (root / CONN).is_file()), None)


def main(arguments: list[str]) -> int:
    file = find(arguments[0] if arguments else None)
    if file is None:
        print(f"sglang: there is no {Path('sglang') / CONN} to compare with", file=sys.stderr)
        return 3
    found = drift(file.read_text(encoding="utf-8"))
    releases = sorted(p.name.split("-")[1].removesuffix(".dist") for p in file.parents[4].glob("sglang-*.dist-info"))
    for line in found:
        print(f"sglang: {line}")
    print(f"sglang {', '.join(releases) or 'of unknown release'}: {len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
