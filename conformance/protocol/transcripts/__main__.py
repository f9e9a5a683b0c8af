"""`python -m tensorferry.conformance.protocol.transcripts`: replay what ships; with --write, record it anew."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tensorferry.conformance.protocol.transcripts.replay import dumps, record, replay, shipped
from tensorferry.conformance.protocol.transcripts.scenarios import SCENARIOS


def write(folder: Path) -> None:
    for name in SCENARIOS:
        text = dumps(record(name))
        (folder / f"{name}.json").write_text(text)
        print(f"{name:40} {len(text):8} bytes")
    for file in folder.glob("*.json"):
        if file.stem not in SCENARIOS:
            file.unlink()
            print(f"{file.stem:40} is no scenario any more: removed")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tensorferry.conformance.protocol.transcripts", description=__doc__)
    parser.add_argument("--write", action="store_true", help="record every scenario into this package's folder")
    asked = parser.parse_args(arguments)
    if asked.write:
        write(Path(__file__).parent)
        return 0
    wrong = 0
    for name, transcript in shipped().items():
        for side in transcript["sides"]:
            found = replay(transcript, side)
            wrong += bool(found)
            print(f"{name:40} {side:10} {'differs' if found else 'ok'}")
            for line in found[:3]:
                print(f"    {line[:500]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
