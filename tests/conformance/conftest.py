"""Lets the modules of this folder, and the scenario helpers, be imported by name."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent

for folder in (HERE, HERE.parent / "scenarios"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
