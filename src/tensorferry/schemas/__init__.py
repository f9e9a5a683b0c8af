"""JSON schemas of what tensorferry prints: contracts that a reader may rely on."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def load(name: str) -> dict[str, Any]:
    """The schema `name` ("demo"). Raises FileNotFoundError where there is none."""
    schema: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return schema
